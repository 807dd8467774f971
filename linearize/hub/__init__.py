"""What leaves the machine: the code and the card that a converted checkpoint carries."""
