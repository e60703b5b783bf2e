"""An HTTP server for one model, whose answers do not depend on its load.

``worker`` is the thread that owns the engine, ``messages`` what comes in, ``answers`` what goes out, ``app``
the endpoints, ``guard`` who may call them, ``server`` the process: socket, signals, the end.
"""
