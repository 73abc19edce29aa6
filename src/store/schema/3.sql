-- What becomes of a volume, whom it belongs to, and how one on device-mapper is known again.
ALTER TABLE volumes ADD COLUMN state TEXT NOT NULL DEFAULT 'enrolled'
    CHECK (state IN ('enrolled', 'retired', 'destroyed'));
ALTER TABLE volumes ADD COLUMN owner TEXT CHECK (owner <> '');
ALTER TABLE volumes ADD COLUMN dm_uuid TEXT CHECK (dm_uuid <> '');

-- No device is enrolled twice; one that was retired or destroyed makes room.
DROP INDEX volumes_lun;
DROP INDEX volumes_wwid;
CREATE UNIQUE INDEX volumes_lun ON volumes (iscsi_target, lun)
    WHERE state = 'enrolled' AND iscsi_target IS NOT NULL AND lun IS NOT NULL;
CREATE UNIQUE INDEX volumes_wwid ON volumes (wwid) WHERE state = 'enrolled' AND wwid IS NOT NULL;
CREATE UNIQUE INDEX volumes_dm_uuid ON volumes (dm_uuid) WHERE state = 'enrolled' AND dm_uuid IS NOT NULL;

-- A domain, by UUID or by name, that may have a volume of another owner until then.
CREATE TABLE grants (
    volume_id TEXT NOT NULL REFERENCES volumes (id),
    domain TEXT NOT NULL CHECK (domain <> ''),
    expires_at INTEGER NOT NULL,
    created_at INTEGER NOT NULL,
    PRIMARY KEY (volume_id, domain)
) STRICT, WITHOUT ROWID;
