"""One backend per framework; each is imported only by those who use that framework."""
