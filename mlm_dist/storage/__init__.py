"""Where bytes come from: local files, servers, object stores, commands; with retries, a cache and read-ahead."""
