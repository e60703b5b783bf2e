"""Tune one regime of the tiny model: a few kernels of one family, seconds; records go to tune_logs/."""

import bitgen

result = bitgen.tune("tiny", families=["i2s"], regimes=["n1"], trials=4, threads=[1])
for winner in result.winners:
    print(winner.shape.name, winner.spec.schedule.name)
