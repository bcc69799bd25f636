"""`Process`, a noise schedule with its tables and operators, and single steps of the reverse process."""
