-- The audit log. A record is one line of JSON that holds the hash of the record before it; `hash` is the SHA-256
-- of its bytes. What is in it stands in the program's module `audit`.
CREATE TABLE audit (
    seq INTEGER PRIMARY KEY CHECK (seq > 0),
    record TEXT NOT NULL
        CHECK (json_valid(record) AND record ->> '$.seq' = seq AND instr(record, char(10)) = 0),
    hash TEXT NOT NULL
        CHECK (length(hash) = 64 AND hash NOT GLOB '*[^0-9a-f]*')
) STRICT;

CREATE TRIGGER audit_is_not_changed BEFORE UPDATE ON audit BEGIN
    SELECT RAISE (ABORT, 'the audit log can only be appended to');
END;

CREATE TRIGGER audit_is_not_shortened BEFORE DELETE ON audit BEGIN
    SELECT RAISE (ABORT, 'the audit log can only be appended to');
END;

-- Replacing a row fires no trigger of its deletion.
CREATE TRIGGER audit_has_no_gap BEFORE INSERT ON audit
WHEN NEW.seq <> (SELECT coalesce(max(seq), 0) + 1 FROM audit) BEGIN
    SELECT RAISE (ABORT, 'the audit log can only be appended to');
END;
