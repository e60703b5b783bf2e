"""An HTTP server for one model, whose answers do not depend on its load.

``worker`` is the thread that owns the engine, ``messages`` what comes in, ``answers`` what goes out, and they
meet in ``service``; ``app`` has the endpoints, ``guard`` says who may call them, ``server`` is the process:
socket, signals, the end.
"""
