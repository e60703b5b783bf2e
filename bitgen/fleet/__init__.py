"""Many machines tune together: a queue in PostgreSQL, a worker on each machine, a coordinator that searches.

The unit of work is a question to a `Runner`: a batch of kernels to verify and time, a block of a race, the
machine's peak. Jobs and answers are data, never code: a worker renders by its own templates and answers for
its own version alone. Nanoseconds of two machines are never compared; what crosses between machines is a
ratio of times that one machine took in the same rounds.
"""
