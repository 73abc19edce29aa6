-- What becomes of keys that are moved from one key manager to another: the newest move of each volume's.
CREATE TABLE key_moves (
    volume_id TEXT NOT NULL PRIMARY KEY
        CHECK (length(volume_id) BETWEEN 1 AND 64 AND volume_id NOT GLOB '*[^A-Za-z0-9._-]*'),
    source TEXT NOT NULL CHECK (source <> ''),
    target TEXT NOT NULL CHECK (target <> '' AND target <> source),
    -- Planned; in both key managers, compared; to be destroyed in the source; in the target alone.
    state TEXT NOT NULL CHECK (state IN ('planned', 'copied', 'leaving', 'moved')),
    since INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX key_moves_state ON key_moves (source, target, state, volume_id);

-- When the key of a volume was used last. The audit log has each use; to look for the last one there would take long.
CREATE TABLE key_uses (
    volume_id TEXT NOT NULL PRIMARY KEY,
    used_at INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
-- What is no record any more is not looked at.
INSERT INTO key_uses (volume_id, used_at)
    SELECT volume, max(time) FROM (
        SELECT json_extract(record, '$.volume') AS volume, json_extract(record, '$.time') AS time
        FROM audit
        WHERE CASE WHEN json_valid(record) THEN json_extract(record, '$.kind') = 'key-used' END
    )
    WHERE typeof(volume) = 'text' AND typeof(time) = 'integer'
    GROUP BY volume;
