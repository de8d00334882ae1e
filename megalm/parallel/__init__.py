"""How one model is spread over ranks: tables that give each layer of the one-device model its parallel form."""
