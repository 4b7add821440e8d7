"""The tools that a policy may ask for, served by a process of their own."""
