"""Research runs in one process: public data cut into sites, joined by an in-process grid."""
