"""How egm_alloc is built: the hooks that pip calls, and what they find out about the machine.

Nothing here is installed, and nothing here imports egm_alloc.
"""
