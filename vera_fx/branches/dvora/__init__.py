"""DVoRA (arXiv 2402.09353, section 5.2): DoRA's magnitude on VeRA's update, ``W' = m * V / |V|`` by rows."""
