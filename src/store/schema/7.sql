-- Which key a volume is encrypted with: the key's id, which is the volume's own unless an operator names another one, and
-- its version. So another key can take its place. What was enrolled before has its first.
ALTER TABLE volumes ADD COLUMN key_id TEXT
    CHECK (length(key_id) BETWEEN 1 AND 128 AND key_id NOT GLOB '*[^A-Za-z0-9._-]*');
ALTER TABLE volumes ADD COLUMN key_version INTEGER NOT NULL DEFAULT 1 CHECK (key_version BETWEEN 1 AND 4294967295);
UPDATE volumes SET key_id = id;
CREATE INDEX volumes_key ON volumes (key_id, key_version);

-- The key that a kept one is a copy of.
ALTER TABLE key_cache ADD COLUMN key_id TEXT
    CHECK (length(key_id) BETWEEN 1 AND 128 AND key_id NOT GLOB '*[^A-Za-z0-9._-]*');
ALTER TABLE key_cache ADD COLUMN key_version INTEGER NOT NULL DEFAULT 1 CHECK (key_version BETWEEN 1 AND 4294967295);
UPDATE key_cache SET key_id = volume_id;
