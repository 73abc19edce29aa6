# shellcheck shell=bash
# Who gets what: root the control socket, a QEMU the volumes that libvirt has given to its domain, and nobody
# else anything.
# machine: second
# takes: 150
# always: yes

wrapper=/usr/libexec/volcrypt/emulators/qemu-system-x86_64

case_two_domains_each_with_a_volume() {
    protect
    volume_create access 16 3
    domain_define mine <(disk_xml "$(lun_path prot-access 0)" sda)
    domain_define theirs <(disk_xml "$(lun_path prot-access 1)" sda)
    domain_start mine
    domain_start theirs
    qemu_io theirs sda 'write -P 0xab 0 64k'
    expect_eq "$(mappings | sort)" "$(printf 'volcrypt-prot-access-%s\n' 0 1)" mappings
}

case_only_root_reaches_the_control_socket() {
    local user since
    for user in nobody libvirt-qemu; do
        expect_fails as "$user" volcrypt status
        expect_contains "$OUTPUT" 'Permission denied' "$user"
        expect_fails as "$user" volcrypt volume export-key prot-access-1 --to "/tmp/$user.key"
        [ ! -e "/tmp/$user.key" ] || fail "$user has got a file for a key"
    done

    # Past the socket's mode the daemon itself says no.
    chmod 666 /run/volcrypt/control.sock
    for user in nobody libvirt-qemu; do
        since=$(date +%s)
        expect_fails as "$user" volcrypt status
        expect_contains "$OUTPUT" 'volcryptd broke off' "$user"
        expect_fails as "$user" volcrypt volume export-key prot-access-1 --to "/tmp/$user.key"
        [ ! -s "/tmp/$user.key" ] || fail "$user has got a key"
        wait_until 20 said_since "$since" 'the client is not root'
    done
    chmod 600 /run/volcrypt/control.sock
    volcrypt status >/dev/null
}

case_another_users_registration_is_dropped() {
    local since
    since=$(date +%s)
    expect_fails as nobody "$wrapper" -machine none -display none -blockdev "$(blockdev "$(lun_device prot-access 1)")"
    expect_contains "$OUTPUT" 'volcryptd did not take this domain'
    wait_until 20 said_since "$since" "of user $(id -u nobody) is no QEMU's"
    nothing_gained
}

# A process of QEMU's user outside libvirt finds the LUN's node as the host has it, root's and of group disk.
case_a_wrapper_outside_libvirt_gets_nothing() {
    local path
    # It may register, and opens what is not protected.
    qemu-img create -q -f raw /var/tmp/lab.raw 1M
    chown libvirt-qemu /var/tmp/lab.raw
    echo quit | as libvirt-qemu timeout 60 "$wrapper" -machine none -display none -nodefaults -monitor stdio \
        -blockdev driver=file,node-name=x,filename=/var/tmp/lab.raw >/dev/null
    rm /var/tmp/lab.raw

    for path in "$(lun_device prot-access 1)" "$(lun_path prot-access 2)"; do
        expect_refused_outside kvm "$path"
    done
    nothing_gained
}

# A node of one's own would prove that libvirt gave the disk. In a user namespace none can be made, and the
# host's keeps its owner when it is bound to another place.
case_a_node_in_a_user_namespace_gets_nothing() {
    local device since
    device=$(lun_device prot-access 1)
    # shellcheck disable=SC2016 # For the shell in the namespace.
    in_namespace 'mount -t tmpfs none /mnt && touch /mnt/is-made && ! mknod /mnt/node b 8 0 2>/dev/null' ||
        fail 'a node could be made, or no tmpfs mounted'
    since=$(date +%s)
    # shellcheck disable=SC2016
    expect_fails in_namespace 'mount -t tmpfs none /mnt && touch /mnt/node && mount --bind "$1" /mnt/node &&
        exec "$2" -machine none -display none -blockdev "$3"' "$device" "$wrapper" "$(blockdev /mnt/node)"
    expect_contains "$OUTPUT" "Could not open '/mnt/node': Permission denied"
    said_since "$since" 'and libvirt has not given it to this QEMU' || fail 'the journal does not name the refusal'
    # Root of its own namespace is nobody to the host, also where it chooses where /dev is.
    since=$(date +%s)
    # shellcheck disable=SC2016
    expect_fails in_namespace 'mount -t tmpfs none /mnt && ln -s "$1" /mnt/node &&
        exec "$2" -machine none -display none -blockdev "$3"' "$device" "$wrapper" "$(blockdev /mnt/node)"
    expect_contains "$OUTPUT" "Could not open '/mnt/node': Permission denied"
    said_since "$since" 'and libvirt has not given it to this QEMU' || fail 'the journal does not name the refusal'
    nothing_gained
}

# A guest that has taken over its QEMU can open any path there is in QEMU's file system.
case_a_domain_cannot_open_anothers_volume_by_its_path() {
    local path
    for path in "$(lun_device prot-access 1)" "$(lun_path prot-access 1)" "$(lun_device prot-access 2)"; do
        expect_contains "$(blockdev_add mine "$path")" "Could not open '$path'" "$path"
    done
    expect_contains "$(virsh qemu-monitor-command mine --hmp "drive_add 0 if=none,id=x,format=raw,file=$(lun_device prot-access 1)")" \
        'Could not open' drive_add
    nothing_gained
}

opened_twice() {
    [ "$(volcrypt status --json | jq '.mappings[] | select(.volume == "prot-access-0").open_count')" = 2 ]
}

# Its own disk it may open, as often as it likes.
case_a_domain_opens_its_own_volume_again() {
    expect_eq "$(blockdev_add mine "$(lun_device prot-access 0)")" '' "the domain's own volume"
    wait_until 30 opened_twice
    virsh --quiet qemu-monitor-command mine '{"execute": "blockdev-del", "arguments": {"node-name": "x"}}' >/dev/null
    wait_until 20 nothing_gained
    qemu_io theirs sda 'read -P 0xab 0 64k'
}

# Another domain's root directory is among them, in proc(5): there libvirt has made a node for that domain.
# The kernel would not let a confined QEMU go there, and neither may the daemon go there for it.
case_a_domain_cannot_open_anothers_volume_through_its_process() {
    local their path number
    their=$(domain_pid theirs)
    for path in "/proc/$their/root$(lun_device prot-access 1)" "/proc/$their/task/$their/root$(lun_device prot-access 1)" \
        "/proc/$their/cwd$(lun_device prot-access 1)" "/dev/../proc/$their/root$(lun_path prot-access 1)"; do
        expect_contains "$(blockdev_add mine "$path")" "Could not open '$path'" "$path"
    done
    # The descriptors of the other QEMU lead to the mapping itself.
    for number in $(block_descriptors "$their"); do
        path=/proc/$their/fd/$number
        expect_contains "$(blockdev_add mine "$path")" "Could not open '$path'" "$path"
    done
    nothing_gained
}

case_the_domains_end() {
    lab_reset
    nothing_left
}

# With the group disk the kernel itself lets QEMU's user open the LUN, as some sites set it up; it is no disk
# that libvirt has given to anybody all the same.
case_the_group_disk_is_no_gift_of_libvirts() {
    volume_create access 16 3
    expect_refused_outside disk "$(lun_device prot-access 1)"
    nothing_left
}

# as USER COMMAND...: without any of root's groups.
as() {
    setpriv --reuid "$1" --regid nogroup --clear-groups "${@:2}"
}

# in_namespace SCRIPT [ARGUMENT...]: as QEMU's user, who is root of a user namespace there.
in_namespace() {
    as libvirt-qemu timeout 60 unshare --user --map-root-user --mount sh -c "$1" sh "${@:2}"
}

# blockdev PATH: as QEMU's option.
blockdev() {
    echo "driver=host_device,node-name=x,filename=$1"
}

# blockdev_add DOMAIN PATH: has its QEMU open PATH; prints the error, if there is one.
blockdev_add() {
    virsh qemu-monitor-command "$1" "{\"execute\": \"blockdev-add\", \"arguments\":
        {\"driver\": \"host_device\", \"node-name\": \"x\", \"filename\": \"$2\", \"cache\": {\"direct\": true}}}" |
        jq --raw-output '.error.desc // empty'
}

# block_descriptors PID: the numbers of its descriptors that are block devices.
block_descriptors() {
    local path
    for path in "/proc/$1/fd/"*; do
        [ ! -b "$path" ] || echo "${path##*/}"
    done
}

# expect_refused_outside GROUP PATH: a wrapper run by QEMU's user with GROUP, outside libvirt, gets nothing.
expect_refused_outside() {
    local since
    since=$(date +%s)
    expect_fails setpriv --reuid libvirt-qemu --regid "$1" --clear-groups timeout 60 \
        "$wrapper" -machine none -display none -blockdev "$(blockdev "$2")"
    expect_contains "$OUTPUT" "Could not open '$2': Permission denied"
    said_since "$since" 'and libvirt has not given it to this QEMU' ||
        fail "the journal does not name the refusal: $(journal_since "@$since")"
    said_since "$since" "was refused \"$2\"" || fail 'the journal does not name the path'
}

# nothing_gained: there are the two mappings of the domains, each open once, by its own.
nothing_gained() {
    expect_eq "$(volcrypt status --json | jq -c '[.mappings[] | [.volume, .open_count] + .domains] | sort')" \
        '[["prot-access-0",1,"mine"],["prot-access-1",1,"theirs"]]' mappings
}
