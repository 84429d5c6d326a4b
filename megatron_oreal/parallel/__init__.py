"""Holds the parallel layout and collectives; of other libraries it imports only torch."""
