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
