-- Which key-encryption key wraps which key, so that two can be in use while one takes the other's place. Each is known
-- by its check value. Those that were replaced stay known, so that none comes back.
CREATE TABLE keks (
    check_value TEXT NOT NULL PRIMARY KEY
        CHECK (length(check_value) = 32 AND check_value NOT GLOB '*[^0-9a-f]*'),
    state TEXT NOT NULL CHECK (state IN ('current', 'outgoing', 'retired')),
    since INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- One wraps new keys, and one at most is on its way out.
CREATE UNIQUE INDEX keks_in_use ON keks (state) WHERE state <> 'retired';

INSERT INTO keks (check_value, state, since)
    SELECT value, 'current', unixepoch() FROM meta WHERE name = 'kek_check_value';
DELETE FROM meta WHERE name = 'kek_check_value';

-- Nothing for a destroyed key.
ALTER TABLE keys ADD COLUMN kek TEXT REFERENCES keks (check_value);
UPDATE keys SET kek = (SELECT check_value FROM keks) WHERE wrapped IS NOT NULL;
CREATE INDEX keys_kek ON keys (kek, volume_id, version);
