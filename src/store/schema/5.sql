-- Keys that a key server gave this host, for when it does not answer. A row goes when its time is over, and when the
-- server says no. `server` is the SHA-256 of what names the server in the configuration.
CREATE TABLE key_cache (
    volume_id TEXT NOT NULL PRIMARY KEY
        CHECK (length(volume_id) BETWEEN 1 AND 64 AND volume_id NOT GLOB '*[^A-Za-z0-9._-]*'),
    server TEXT NOT NULL
        CHECK (length(server) = 64 AND server NOT GLOB '*[^0-9a-f]*'),
    key_size INTEGER NOT NULL CHECK (key_size IN (128, 256, 512)),
    wrapped BLOB NOT NULL,
    kek TEXT NOT NULL REFERENCES keks (check_value),
    fetched_at INTEGER NOT NULL CHECK (fetched_at >= 0)
) STRICT;
