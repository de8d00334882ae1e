"""How a model is spread over ranks and what it keeps in memory: applied to the one-device model when it is built."""
