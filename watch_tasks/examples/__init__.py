"""Examples that run: each is a module to read first and to copy from."""
