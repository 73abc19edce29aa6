# shellcheck shell=bash
# shellcheck disable=SC2154 # The helpers that are sourced first assign what is not assigned here.
# Every use of a key and every refusal is recorded, with the domain and the process; the journal has the same; and
# whoever changes the log is found out.
# machine: second
# takes: 110

au_database=/var/lib/volcrypt/volcrypt.db

# ready: domain `au` runs, volume prot-au-0 is enrolled and prot-au-1 is not.
ready() {
    [ "$(virsh --quiet domstate au 2>/dev/null)" != running ] || return 0
    protect
    target_create prot-au 4 2
    target_login prot-au
    volcrypt volume enrol "$(lun_path prot-au 0)" >/dev/null
    domain_define au
    domain_start au
    newest >/run/lab-au.from
}

# records [OPTION...]: each record as one line: number, kind, volume, domain, pid, who, outcome.
records() {
    volcrypt audit show --limit 1000000 --json "$@" |
        jq --raw-output '.[] | "\(.seq) \(.kind) \(.volume) \(.domain) \(.pid) \(.by) \(.outcome)"'
}

# newest: the number of the newest record.
newest() {
    volcrypt audit verify | cut -d ' ' -f 1
}

case_uses_and_refusals_are_recorded() {
    local from pid uuid
    ready
    pid=$(domain_pid au)
    uuid=$(virsh --quiet domuuid au | head -n 1)
    from=$(newest)
    disk_attach au "$(lun_path prot-au 0)" sdb
    disk_detach au sdb
    expect_fails disk_attach au "$(lun_path prot-au 1)" sdb
    volcrypt audit show --volume prot-au-0 --limit 3
    expect_contains "$(records --volume prot-au-0 --kind key-used)" "key-used prot-au-0 au $pid guest done"
    wait_until 10 has_refusal "refused prot-au-1 au $pid guest ENOKEY"
    expect_eq "$(volcrypt audit show --json --limit 1 | jq --raw-output '.[0].domain_uuid')" "$uuid" 'the UUID'
    expect_contains "$(volcrypt audit show --limit 1)" 'volume prot-au-1 on '
    volcrypt volume export-key prot-au-0 --to /run/lab-au.key >/dev/null
    rm /run/lab-au.key
    expect_contains "$(records)" 'key-exported prot-au-0 null'
    [ "$(newest)" -gt $((from + 2)) ] || fail 'too few records'
}

has_refusal() {
    [[ $(records --kind refused) == *"$1"* ]]
}

case_a_started_domain_is_recorded() {
    ready
    disk_xml "$(lun_path prot-au 0)" sda >/run/lab-as.disk
    domain_define as /run/lab-as.disk
    domain_start as
    expect_contains "$(records --kind key-used)" 'key-used prot-au-0 as null hook done'
    expect_contains "$(records --kind key-used)" "key-used prot-au-0 as $(domain_pid as) guest done"
    domain_destroy as
    domain_undefine as
    nothing_left
}

case_the_journal_is_the_second_witness() {
    ready
    journalctl --sync
    volcrypt audit show --limit 1000000 --json | jq --raw-output --argjson from "$(cat /run/lab-au.from)" \
        '.[] | select(.seq > $from) | "\(.seq) \(.hash)"' | sort >/run/lab-au.log
    journalctl --unit volcryptd --output json --boot |
        jq --raw-output 'select(.VOLCRYPT_AUDIT_SEQ) | .VOLCRYPT_AUDIT_SEQ + " " + .VOLCRYPT_AUDIT_HASH' |
        sort >/run/lab-au.journal
    expect_eq "$(comm -23 /run/lab-au.log /run/lab-au.journal)" '' 'what only the log has'
    [ -n "$(journalctl --quiet VOLCRYPT_AUDIT_KIND=key-used VOLCRYPT_VOLUME=prot-au-0 VOLCRYPT_DOMAIN=au)" ] ||
        fail 'the journal is not searched by field'
}

# tampered SQL: what verifying says after it, made by root in the file; the file is put back afterwards.
tampered() {
    systemctl stop volcryptd
    cp --preserve "$au_database" /root/lab-au.db
    python3 - "$au_database" "$1" <<'PYTHON'
import sqlite3, sys
database = sqlite3.connect(sys.argv[1], isolation_level=None)
database.execute("PRAGMA ignore_check_constraints = ON")
for (trigger,) in database.execute("SELECT name FROM sqlite_schema WHERE type = 'trigger'").fetchall():
    database.execute(f"DROP TRIGGER {trigger}")
database.execute(sys.argv[2])
PYTHON
    systemctl start volcryptd
    expect_fails volcrypt audit verify
    systemctl stop volcryptd
    rm -f "$au_database"-wal "$au_database"-shm
    mv /root/lab-au.db "$au_database"
    systemctl start volcryptd
    echo "$OUTPUT"
}

case_tampering_is_named() {
    ready
    [ "$(newest)" -ge 5 ] || fail 'too few records'
    expect_contains "$(tampered "UPDATE audit SET record = record || ' ' WHERE seq = 3")" \
        'record 3 was changed'
    expect_contains "$(tampered 'DELETE FROM audit WHERE seq = 3')" 'record 3 is missing'
    volcrypt audit verify
    expect_fails python3 -c "import sqlite3; sqlite3.connect('$au_database').execute('DELETE FROM audit')"
    expect_contains "$OUTPUT" 'the audit log can only be appended to'
    # With nothing of volcrypt's.
    expect_eq "$(python3 -c "
import hashlib, sqlite3
rows = sqlite3.connect('$au_database').execute('SELECT record, hash FROM audit ORDER BY seq').fetchall()
previous = '0' * 64
for record, hash in rows:
    assert hashlib.sha256(record.encode()).hexdigest() == hash and '\"previous\":\"' + previous + '\"' in record
    previous = hash
print('sound')")" sound 'the chain'
    domain_destroy au
}
