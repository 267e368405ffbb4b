"""Where a program runs: processes, the device mesh and its sharding rules, compiling, memory."""
