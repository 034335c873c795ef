"""The command line. A command is a function, its flags are that function's signature; `main` only registers."""
