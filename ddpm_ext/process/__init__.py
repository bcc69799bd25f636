"""One schedule with its tables and operators, and the single steps that are taken with them."""
