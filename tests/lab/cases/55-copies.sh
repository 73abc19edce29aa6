# shellcheck shell=bash
# shellcheck disable=SC2154 # The helpers that are sourced first assign what is not assigned here.
# Snapshots, block copies, backups, saved states and disks that are attached: what a guest with a protected volume
# writes in clear, and what it does not.
# takes: 780

images=/var/lib/libvirt/images
saved=/var/lib/libvirt/qemu/save

case_a_guest_with_a_protected_disk() {
    protect
    volume_create copies 16 4
    target_create plain 16 2
    target_login plain
    mkdir -p "$images"
    domain_define vm <(disk_xml "$(lun_path prot-copies 0)" sda)
    domain_start vm
    qemu_io vm sda 'write -P 0xab 0 1M'
}

case_a_snapshot_into_a_file_is_refused() {
    local since
    since=$(date +@%s)
    refused 'Permission denied' virsh snapshot-create-as vm s1 --disk-only --diskspec "sda,file=$images/s1.qcow2"
    expect_contains "$(journal_since "$since")" "QEMU of domain vm may not write to $images/s1.qcow2, which nothing encrypts, while \
it uses the protected volume prot-copies-0: a copy in clear could come to stand there; if it may, add its path to \
plaintext_targets in [policy], and run 'systemctl reload volcryptd'" 'the journal'
    expect_contains "$(volcrypt audit show --kind refused --limit 1)" "$images/s1.qcow2" 'the audit log'
    refused 'Permission denied' virsh snapshot-create-as vm s1 --disk-only --no-metadata --diskspec "sda,file=$images/s1.qcow2"
    refused 'Permission denied' virsh snapshot-create-as vm s1 --memspec "file=$images/s1.memory" --diskspec "sda,file=$images/s1.qcow2"
    # By way of the monitor, past libvirt.
    refused_by_monitor "$images/s1.qcow2" blockdev-snapshot-sync \
        "\"node-name\": \"libvirt-1-storage\", \"snapshot-node-name\": \"s\", \"snapshot-file\": \"$images/s1.qcow2\""
    # libvirt itself knows that this cannot be.
    refused 'unsupported for storage type raw' virsh snapshot-create-as vm s1
}

case_a_block_copy_is_refused() {
    local job
    refused 'Permission denied' virsh blockcopy vm sda "$images/copy.raw" --format raw --transient-job --wait --pivot
    refused 'Permission denied' virsh blockcopy vm sda "$images/copy.qcow2" --format qcow2 --transient-job --wait --pivot
    qemu-img create -q -f qcow2 "$images/copy.qcow2" 16M
    refused 'Permission denied' virsh blockcopy vm sda "$images/copy.qcow2" --format qcow2 --reuse-external --transient-job --wait --pivot
    rm -f "$images/copy.qcow2"
    refused 'Permission denied' virsh blockcopy vm sda "$(lun_path plain 0)" --blockdev --format raw --transient-job --wait --pivot
    for job in drive-mirror drive-backup; do
        refused_by_monitor "$images/$job.raw" "$job" \
            "\"device\": \"libvirt-1-storage\", \"sync\": \"full\", \"format\": \"raw\", \"target\": \"$images/$job.raw\""
    done
}

case_a_backup_is_refused() {
    refused 'Permission denied' backup push "type='file'" "<target file='$images/backup.qcow2'/><driver type='qcow2'/>"
    refused 'Permission denied' backup push "type='block'" "<target dev='$(lun_path plain 0)'/><driver type='raw'/>"
    # Where the guest writes meanwhile, what stood there before.
    refused 'Permission denied' backup pull "type='file'" "<scratch file='$images/scratch.qcow2'/>"
    refused 'unsupported for storage type raw' virsh checkpoint-create-as vm c1
}

case_what_is_attached_is_refused_unless_it_is_only_read() {
    qemu-img create -q -f raw "$images/data.raw" 16M
    refused 'Permission denied' virsh attach-disk vm "$images/data.raw" sdb --targetbus scsi --driver qemu --subdriver raw --live
    refused 'Permission denied' disk_attach vm "$(lun_path plain 0)" sdb
    virsh --quiet attach-disk vm "$(lun_path plain 0)" sdb --targetbus scsi --driver qemu --subdriver raw --live --mode readonly
    disk_detach vm sdb
    rm "$images/data.raw"
    # Encrypted as well.
    disk_attach vm "$(lun_path prot-copies 1)" sdb
    qemu_io vm sdb 'write -P 0xab 0 64k'
    disk_detach vm sdb
    wait_until 20 unmapped prot-copies-1
}

case_a_daemon_that_was_restarted_refuses_it_too() {
    systemctl restart volcryptd
    refused 'Permission denied' virsh snapshot-create-as vm s1 --disk-only --no-metadata --diskspec "sda,file=$images/s1.qcow2"
}

# Of the memory libvirt opens the file, and QEMU gets a descriptor.
case_states_are_saved_and_restored_and_hold_memory_only() {
    virsh --quiet dump vm "$images/memory" --memory-only
    rm "$images/memory"
    virsh --quiet save vm "$images/saved"
    wait_until 20 no_mapping
    virsh --quiet restore "$images/saved"
    goes_on
    rm "$images/saved"
    virsh --quiet managedsave vm
    wait_until 20 no_mapping
    ! LC_ALL=C grep -qaP '\xab{4096}' "$saved/vm.save" || fail 'the disk is in the saved state'
    domain_start vm
    goes_on
}

case_a_block_copy_to_a_protected_volume_moves_the_disk() {
    virsh --quiet blockcopy vm sda "$(lun_path prot-copies 1)" --blockdev --format raw --transient-job --wait --pivot >/dev/null
    expect_mapped prot-copies-1
    wait_until 20 unmapped prot-copies-0
    goes_on prot-copies-1
    expect_ciphertext copies 1
    virsh --quiet blockcopy vm sda "$(lun_path prot-copies 0)" --blockdev --format raw --transient-job --wait --pivot >/dev/null
    wait_until 20 unmapped prot-copies-1
    goes_on
}

case_a_backup_goes_to_a_protected_volume() {
    backup push "type='block'" "<target dev='$(lun_path prot-copies 2)'/><driver type='raw'/>"
    wait_until 60 completed Backup
    wait_until 20 unmapped prot-copies-2
    expect_ciphertext copies 2
    # What a client of the network reads is in clear; what the guest overwrites meanwhile is not.
    backup pull "type='block'" "<scratch dev='$(lun_path prot-copies 3)'/>"
    qemu_io vm sda 'write -P 0xcd 2M 64k'
    qemu_io vm sda 'write -P 0xcd 0 64k'
    qemu-img convert -f raw -O raw nbd://localhost:10809/sda "$images/pulled.raw"
    LC_ALL=C grep -qaP '^\xab{4096}' "$images/pulled.raw" || fail 'the client did not read what the disk held'
    rm "$images/pulled.raw"
    virsh --quiet domjobabort vm
    wait_until 20 unmapped prot-copies-3
    expect_ciphertext copies 3
    qemu_io vm sda 'write -P 0xab 0 64k'
    goes_on
}

case_a_snapshot_on_a_protected_volume_survives_a_restart() {
    snapshot_on "$(lun_path prot-copies 2)"
    qemu_io vm sda 'write -P 0xcd 0 64k'
    expect_ciphertext copies 2 cd
    domain_destroy vm
    wait_until 20 no_mapping
    domain_start vm
    expect_eq "$(mappings | wc -l)" 2 'number of mappings'
    qemu_io vm sda 'read -P 0xcd 0 64k'
    qemu_io vm sda 'read -P 0xab 64k 64k'
    virsh --quiet blockcommit vm sda --active --pivot --wait >/dev/null
    wait_until 20 unmapped prot-copies-2
    qemu_io vm sda 'read -P 0xcd 0 64k'
    qemu_io vm sda 'write -P 0xab 0 64k'
    goes_on
}

# libvirt cannot see in the ciphertext on what the image stands.
case_an_image_in_a_volume_needs_its_backing_chain_in_the_xml() {
    local said
    snapshot_on "$(lun_path prot-copies 2)"
    virsh dumpxml vm --inactive >"$images/chain.xml"
    domain_destroy vm
    domain_undefine vm
    domain_define vm <(disk_xml "$(lun_path prot-copies 2)" sda | sed "s/type='raw'/type='qcow2'/")
    expect_fails domain_start vm
    said='disk sda: libvirt cannot see on which image the one in the protected volume prot-copies-2 stands, and the guest would read
zeros in the place of that: say it with <backingStore> in the disk'"'"'s XML, where <backingStore/> stands for none'
    expect_contains "$OUTPUT" "${said//$'\n'/ }"
    domain_undefine vm
    virsh --quiet define "$images/chain.xml"
    domain_start vm
    qemu_io vm sda 'read -P 0xab 0 1M'
    virsh --quiet blockcommit vm sda --active --pivot --wait >/dev/null
    goes_on
    rm "$images/chain.xml"
}

# What is pulled comes on top of what qcow2 needs for itself.
case_a_larger_protected_volume_takes_all_of_a_disk() {
    volume_create large 32
    snapshot_on "$(lun_path prot-large)"
    virsh --quiet blockpull vm sda --wait >/dev/null
    wait_until 20 unmapped prot-copies-0
    goes_on prot-large-0
    expect_ciphertext large
    virsh --quiet snapshot-create-as vm internal
    virsh --quiet snapshot-delete vm internal
    domain_destroy vm
    domain_start vm
    goes_on prot-large-0
    virsh --quiet blockcopy vm sda "$(lun_path prot-copies 0)" --blockdev --format raw --transient-job --wait --pivot >/dev/null
    wait_until 20 unmapped prot-large-0
    goes_on
}

case_the_configuration_allows_a_file() {
    allow "plaintext_targets = ['$images/allowed-.*']"
    virsh --quiet snapshot-create-as vm s1 --disk-only --no-metadata --diskspec "sda,file=$images/allowed-1.qcow2"
    qemu_io vm sda 'write -P 0xcd 0 64k'
    domain_destroy vm
    domain_start vm
    qemu_io vm sda 'read -P 0xcd 0 64k'
    qemu_io vm sda 'read -P 0xab 64k 64k'
    virsh --quiet blockcommit vm sda --active --pivot --wait >/dev/null
    rm "$images/allowed-1.qcow2"
    qemu_io vm sda 'write -P 0xab 0 64k'
    refused 'Permission denied' virsh blockcopy vm sda "$images/other.raw" --format raw --transient-job --wait --pivot
    qemu-img create -q -f raw "$images/allowed-data.raw" 16M
    virsh --quiet attach-disk vm "$images/allowed-data.raw" sdb --targetbus scsi --driver qemu --subdriver raw --live
    qemu_io vm sdb 'write -P 0xab 0 64k'
    disk_detach vm sdb
    rm "$images/allowed-data.raw"
}

# libvirt writes the overlay into its XML; that is no reason to go on with it.
case_an_overlay_is_refused_when_it_is_not_allowed_any_more() {
    local since
    virsh --quiet snapshot-create-as vm s1 --disk-only --no-metadata --diskspec "sda,file=$images/allowed-2.qcow2"
    domain_destroy vm
    allow
    since=$(date +@%s)
    expect_fails domain_start vm
    expect_contains "$OUTPUT" "$images/allowed-2.qcow2': Permission denied"
    expect_contains "$(journal_since "$since")" "may not write to $images/allowed-2.qcow2" 'the journal'
    wait_until 20 no_mapping
    allow "plaintext_targets = ['.*']"
    domain_start vm
    virsh --quiet blockcommit vm sda --active --pivot --wait >/dev/null
    rm "$images/allowed-2.qcow2"
    goes_on
}

case_a_rule_allows_a_device() {
    allow
    refused 'Permission denied' disk_attach vm "$(lun_path plain 1)" sdb
    printf '%s\n' '[[rules]]' 'name = "plain"' 'action = "pass"' "iscsi_target = 'iqn\\.2026-11\\.org\\.lab:plain'" 'lun = 1' \
        >>"$volcrypt_config"
    reload
    disk_attach vm "$(lun_path plain 1)" sdb
    qemu_io vm sdb 'write -P 0xab 0 64k'
    disk_detach vm sdb
    refused 'Permission denied' disk_attach vm "$(lun_path plain 0)" sdb
    virsh --quiet blockcopy vm sda "$(lun_path plain 1)" --blockdev --format raw --transient-job --wait --finish >/dev/null
    goes_on
}

case_what_a_guest_starts_with_is_its_own() {
    qemu-img create -q -f qcow2 "$images/data.qcow2" 16M
    domain_destroy vm
    domain_undefine vm
    domain_define vm <(disk_xml "$(lun_path prot-copies 0)" sda) <(file_xml "$images/data.qcow2" sdb) \
        <(disk_xml "$(lun_path plain 0)" sdc) <(echo "<video><model type='vga'/></video>")
    domain_start vm
    # QEMU writes it where libvirt keeps such things.
    virsh --quiet screenshot vm "$images/screen.png" >/dev/null
    [ -s "$images/screen.png" ] || fail 'there is no screenshot'
    rm "$images/screen.png"
    goes_on
    qemu_io vm sdb 'write -P 0x11 0 64k'
    qemu_io vm sdc 'write -P 0x11 0 64k'
    # QEMU does not tell which disk it copies.
    refused 'Permission denied' virsh blockcopy vm sdb "$images/copy.qcow2" --format qcow2 --transient-job --wait --pivot
    disk_detach vm sda
    wait_until 20 no_mapping
    virsh --quiet blockcopy vm sdb "$images/copy.qcow2" --format qcow2 --transient-job --wait --pivot >/dev/null
    qemu_io vm sdb 'read -P 0x11 0 64k'
}

case_a_guest_without_a_protected_volume_is_as_ever() {
    domain_define other <(file_xml "$images/data.qcow2" sda)
    domain_start other
    virsh --quiet snapshot-create-as other s1 --disk-only --no-metadata --diskspec "sda,file=$images/s1.qcow2"
    disk_attach other "$(lun_path plain 1)" sdb
    qemu_io other sda 'write -P 0x11 0 64k'
    rm "$images"/*
    lab_reset
    nothing_left
}

# refused SENTENCE COMMAND...: it fails with the sentence, and nothing comes of it: the guest goes on with its disk,
# no job is left, no overlay and no image with anything of the guest's in it.
refused() {
    local sentence=$1 before
    shift
    before=$(virsh dumpxml vm | sed "s/ index='[0-9]*'//")
    expect_fails "$@"
    expect_contains "$OUTPUT" "$sentence"
    # libvirt counts its images.
    expect_eq "$(virsh dumpxml vm | sed "s/ index='[0-9]*'//")" "$before" 'the XML'
    ! grep -qE '<mirror|<blockjob |<domainbackup' /run/libvirt/qemu/vm.xml || fail 'a job is left'
    expect_eq "$(virsh --quiet snapshot-list vm)$(virsh --quiet checkpoint-list vm)" '' 'snapshots and checkpoints'
    ! LC_ALL=C grep -lraP '\xab{32}' "$images" || fail 'plaintext stands in a file'
    ! LC_ALL=C grep -qaP '\xab{32}' "$(lun_backing plain 0)" || fail 'plaintext stands on the plain LUN'
    goes_on
}

# refused_by_monitor FILE COMMAND ARGUMENTS: QEMU's own command may not make the file. AppArmor would not let it
# either, so the journal has to tell who refused it.
refused_by_monitor() {
    local since
    since=$(date +@%s)
    expect_contains "$(virsh qemu-monitor-command vm "{\"execute\": \"$2\", \"arguments\": {$3}}")" 'Permission denied' "$2"
    expect_contains "$(journal_since "$since")" "may not write to $1, which nothing encrypts" "the journal after $2"
    [ ! -e "$1" ] || fail "$2 has made $1"
    goes_on
}

# goes_on [VOLUME]: the guest's disk reads what was written, and takes more.
goes_on() {
    expect_mapped "${1:-prot-copies-0}"
    qemu_io vm sda 'read -P 0xab 0 1M' >/dev/null
    qemu_io vm sda 'write -P 0xab 1M 64k' >/dev/null
}

# backup MODE DISK_ATTRIBUTES WHERE: of the disk sda.
backup() {
    {
        echo "<domainbackup mode='$1'>"
        [ "$1" = push ] || echo "<server transport='tcp' name='localhost' port='10809'/>"
        echo "<disks><disk name='sda' $2>$3</disk></disks></domainbackup>"
    } | virsh --quiet backup-begin vm /dev/stdin
}

completed() {
    virsh domjobinfo vm --completed | grep -q "$1"
}

# snapshot_on DEVICE: the domain writes into a qcow2 image on the device from now on.
snapshot_on() {
    virsh --quiet snapshot-create vm /dev/stdin --disk-only --no-metadata >/dev/null <<XML
<domainsnapshot><name>s</name><disks><disk name='sda' type='block' snapshot='external'>
  <driver type='qcow2'/><source dev='$1'/>
</disk></disks></domainsnapshot>
XML
}

file_xml() {
    disk_xml "$@" | sed "s/type='block'/type='file'/; s/type='raw'/type='qcow2'/; s/source dev=/source file=/"
}

unmapped() {
    ! mappings | grep -qx "volcrypt-$1"
}

# allow [LINE]: puts the line into the section [policy], and takes the one before out.
allow() {
    sed -i '/^plaintext_targets/d' "$volcrypt_config"
    [ $# -eq 0 ] || sed -i "/^export_keys/a $1" "$volcrypt_config"
    volcrypt config check >/dev/null
    reload
}
