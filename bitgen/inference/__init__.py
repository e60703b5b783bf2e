"""From weights to text: the engine over a kernel library, its scheduler, sampling, chat."""
