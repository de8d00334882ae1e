"""From a login node to running ranks: batch scripts, command lines of the launchers, and a look at the machine."""
