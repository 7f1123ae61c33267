"""Everything a run needs that is not the method: settings, models, memory, ranks, files, servers. May stay closed."""
