"""What servers over one store tell each other. The store is the truth; Redis, if there is one, makes it quick."""
