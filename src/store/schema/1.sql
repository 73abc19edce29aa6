CREATE TABLE meta (
    name TEXT NOT NULL PRIMARY KEY,
    value TEXT NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE volumes (
    id TEXT NOT NULL PRIMARY KEY
        CHECK (length(id) BETWEEN 1 AND 64 AND id NOT GLOB '*[^A-Za-z0-9._-]*'),
    iscsi_target TEXT CHECK (iscsi_target <> ''),
    lun INTEGER CHECK (lun >= 0),
    wwid TEXT CHECK (wwid <> ''),
    size_bytes INTEGER NOT NULL CHECK (size_bytes > 0),
    profile TEXT NOT NULL CHECK (profile <> ''),
    provider TEXT NOT NULL CHECK (provider <> ''),
    cipher TEXT NOT NULL CHECK (cipher <> ''),
    key_size INTEGER NOT NULL CHECK (key_size IN (128, 256, 512)),
    sector_size INTEGER NOT NULL CHECK (sector_size IN (512, 1024, 2048, 4096)),
    check_value TEXT NOT NULL
        CHECK (length(check_value) = 32 AND check_value NOT GLOB '*[^0-9a-f]*'),
    enrolled_at INTEGER NOT NULL
) STRICT;

-- No device is enrolled twice.
CREATE UNIQUE INDEX volumes_lun ON volumes (iscsi_target, lun) WHERE iscsi_target IS NOT NULL AND lun IS NOT NULL;
CREATE UNIQUE INDEX volumes_wwid ON volumes (wwid) WHERE wwid IS NOT NULL;

-- A destroyed key leaves its row without the wrapped key. There is no reference to volumes: a key
-- is stored before its volume is enrolled.
CREATE TABLE keys (
    volume_id TEXT NOT NULL
        CHECK (length(volume_id) BETWEEN 1 AND 64 AND volume_id NOT GLOB '*[^A-Za-z0-9._-]*'),
    version INTEGER NOT NULL CHECK (version BETWEEN 1 AND 4294967295),
    key_size INTEGER NOT NULL CHECK (key_size IN (128, 256, 512)),
    wrapped BLOB,
    created_at INTEGER NOT NULL,
    destroyed_at INTEGER,
    PRIMARY KEY (volume_id, version),
    CHECK ((wrapped IS NULL) = (destroyed_at IS NOT NULL))
) STRICT;
