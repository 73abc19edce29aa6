# Helpers for cases, which run in the lab's machine. Sourced, never run.
# shellcheck shell=bash

lab_iqn=iqn.2026-11.org.lab
lab_portal=127.0.0.1:3260
lab_store=/var/lib/lab
lab_configfs=/sys/kernel/config/target

# --- Expectations -------------------------------------------------------------------------------------

# fail MESSAGE
fail() {
    echo "FAILED: $*" >&2
    exit 1
}

# expect_eq ACTUAL EXPECTED [WHAT]
expect_eq() {
    [ "$1" = "$2" ] || fail "${3:-value}: expected '$2', got '$1'"
}

# expect_contains TEXT PART [WHAT]
expect_contains() {
    [[ $1 == *"$2"* ]] || fail "${3:-text}: expected '$2' in '$1'"
}

# expect_fails COMMAND...: the command must fail; what it printed is in $OUTPUT, its code in $CODE.
expect_fails() {
    CODE=0
    OUTPUT=$("$@" 2>&1) || CODE=$?
    [ "$CODE" -ne 0 ] || fail "'$*' was expected to fail, it printed '$OUTPUT'"
}

# wait_until SECONDS COMMAND...: repeats the command until it succeeds. Its output is dropped. It is never less than 90
# seconds: a machine that a busy host emulates may stand still for a while, and only who waits in vain learns of it later.
wait_until() {
    local limit=$1 end
    shift
    [ "$limit" -ge 90 ] || limit=90
    end=$((SECONDS + limit))
    # In a process of its own, which a helper that fails ends.
    until ("$@") >/dev/null 2>&1; do
        [ "$SECONDS" -lt "$end" ] || fail "still not so after $limit seconds: $*"
        sleep 0.1
    done
}

# traced PID TRACER: all its threads are.
traced() {
    [ -z "$(grep -L "^TracerPid:[[:space:]]*$2\$" "/proc/$1/task/"*/status || true)" ]
}

# skip REASON: ends the case as skipped.
skip() {
    echo "SKIP $*"
    exit 77
}

# --- Storage server: LIO targets, one file per LUN ------------------------------------------------------
# Written straight into configfs: a start of targetcli takes seconds here. A target is known by its files
# in $lab_store, so it can be set up again after a restart of the machine without a saved configuration.

# target_create NAME SIZE_MB [LUNS]
target_create() {
    local name=$1 size=$2 luns=${3:-1} lun
    mkdir -p "$lab_store/$name"
    for ((lun = 0; lun < luns; lun++)); do
        truncate --size "${size}M" "$(lun_backing "$name" "$lun")"
    done
    target_restore "$name"
}

# target_restore NAME: offers the target again, as after a restart of the machine.
target_restore() {
    local name=$1 file tpg
    tpg=$lab_configfs/iscsi/$lab_iqn:$name/tpgt_1
    [ ! -d "$tpg" ] || return 0
    modprobe --all target_core_file iscsi_target_mod
    mkdir -p "$lab_configfs/iscsi" "$tpg"
    for file in "$lab_store/$name"/*; do
        lun_offer "$name" "${file##*/}"
    done
    echo 0 >"$tpg/attrib/authentication"
    echo 0 >"$tpg/attrib/demo_mode_write_protect"
    echo 1 >"$tpg/attrib/generate_node_acls"
    mkdir "$tpg/np/$lab_portal"
    echo 1 >"$tpg/enable"
}

# lun_offer NAME LUN [SEED]: offers the LUN's file. From SEED comes the unit serial, and with it the WWID and the
# links under /dev/disk/by-id; without one they are the same after a restart.
lun_offer() {
    local name=$1 lun=$2 seed=${3:-$1.$2} file backstore unit
    file=$(lun_backing "$name" "$lun")
    backstore=$lab_configfs/core/fileio_0/$name.$lun
    unit=$lab_configfs/iscsi/$lab_iqn:$name/tpgt_1/lun/lun_$lun
    mkdir -p "$backstore" "$unit"
    printf 'fd_dev_name=%s,fd_dev_size=%s,fd_buffered_io=1' "$file" "$(stat -c %s "$file")" >"$backstore/control"
    echo "$seed" | md5sum | cut -c 1-32 >"$backstore/wwn/vpd_unit_serial"
    echo 1 >"$backstore/enable"
    ln -s "$backstore" "$unit/$name.$lun"
}

# lun_renew NAME LUN SEED: deletes the LUN on the storage server and makes a blank one of its size in its place. The
# initiator has to be logged out.
lun_renew() {
    local name=$1 lun=$2 size
    rm "$lab_configfs/iscsi/$lab_iqn:$name/tpgt_1/lun/lun_$lun/$name.$lun"
    rmdir "$lab_configfs/core/fileio_0/$name.$lun"
    size=$(stat -c %s "$(lun_backing "$name" "$lun")")
    rm "$(lun_backing "$name" "$lun")"
    truncate --size "$size" "$(lun_backing "$name" "$lun")"
    lun_offer "$@"
}

# targets_restore: all targets there ever were.
targets_restore() {
    local folder
    for folder in "$lab_store"/*/; do
        [ ! -d "$folder" ] || target_restore "$(basename "$folder")"
    done
}

# target_login NAME: offers the target if it is not offered yet, and waits for the links of all its LUNs.
target_login() {
    local name=$1 file
    target_restore "$name"
    iscsi_node "$name" --op new >/dev/null
    iscsi_node "$name" --login >/dev/null
    for file in "$lab_store/$name"/*; do
        wait_until 30 test -b "$(lun_path "$name" "${file##*/}")"
    done
    udevadm settle --timeout 180
}

# target_logout NAME
target_logout() {
    iscsi_node "$1" --logout >/dev/null
}

# portal_login NAME ADDRESS: offers the target at another address as well, and logs in there too.
portal_login() {
    local name=$1 lab_portal=$2:3260
    mkdir -p "$lab_configfs/iscsi/$lab_iqn:$name/tpgt_1/np/$lab_portal"
    target_login "$name"
}

# portal_logout NAME ADDRESS
portal_logout() {
    local lab_portal=$2:3260
    target_logout "$1"
}

iscsi_node() {
    local name=$1
    shift
    iscsiadm --mode node --targetname "$lab_iqn:$name" --portal "$lab_portal" "$@"
}

# target_delete NAME: whoever is logged in loses the LUNs; the files and the initiator's record go too.
target_delete() {
    local name=$1 tpg backstore
    tpg=$lab_configfs/iscsi/$lab_iqn:$name/tpgt_1
    if [ -d "$tpg" ]; then
        echo 0 >"$tpg/enable"
        find "$tpg/lun" -type l -delete
        rmdir "$tpg"/np/* "$tpg"/lun/lun_* "$tpg" "${tpg%/*}"
        for backstore in "$lab_configfs/core/fileio_0/$name".*; do
            rmdir "$backstore"
        done
    fi
    rm -rf "${lab_store:?}/$name"
    # At every portal.
    iscsiadm --mode node --targetname "$lab_iqn:$name" --op delete 2>/dev/null || true
}

# lun_path NAME [LUN]: the link that Nova and libvirt would be given.
lun_path() {
    echo "/dev/disk/by-path/ip-$lab_portal-iscsi-$lab_iqn:$1-lun-${2:-0}"
}

# lun_device NAME [LUN]: the device behind the link, /dev/sdX.
lun_device() {
    readlink -e "$(lun_path "$@")"
}

# lun_backing NAME [LUN]: the file on the storage server: what leaves the hypervisor.
lun_backing() {
    echo "$lab_store/$1/${2:-0}"
}

# --- What hosts stack on disks --------------------------------------------------------------------------

lab_multipath_config=/etc/multipath.conf
lab_multipath_rule=/etc/udev/rules.d/60-multipath.rules

# multipath_on: has multipathd join what it sees over more than one path, from now on.
multipath_on() {
    cat >"$lab_multipath_config" <<'CONFIG'
defaults {
    user_friendly_names yes
    find_multipaths yes
    polling_interval 1
}
overrides {
    no_path_retry fail
}
CONFIG
    rm -f "$lab_multipath_rule"
    udevadm control --reload
    systemctl --quiet unmask multipathd.service
    systemctl start multipathd.service
}

# multipath_off: as multipath_on found it. No map may be in use.
multipath_off() {
    [ -e "$lab_multipath_config" ] || return 0
    # Without the daemon, which could make a map anew.
    systemctl stop multipathd.service
    wait_until 20 multipath_flush
    systemctl --quiet mask multipathd.service
    rm "$lab_multipath_config"
    ln -sf /dev/null "$lab_multipath_rule"
    udevadm control --reload
}

# multipath_flush: fails as long as a map is left; one may be open for a moment.
multipath_flush() {
    multipath -F >/dev/null
    ! dmsetup ls --target multipath | grep -q '('
}

# multipath_map PATH: the map that the disk is a path of, /dev/mapper/mpathX; fails if there is none.
multipath_map() {
    local holder
    for holder in "/sys/block/$(basename "$1")/holders"/dm-*; do
        if grep -qs '^mpath-' "$holder/dm/uuid"; then
            echo "/dev/mapper/$(cat "$holder/dm/name")"
            return
        fi
    done
    return 1
}

# volume_group NAME DEVICE: with one logical volume of 4 MiB, `lv`.
volume_group() {
    lvm_quiet vgcreate --quiet "$1" "$2"
    lvm_quiet lvcreate --quiet --yes --wipesignatures n --zero n --name lv --size 4M "$1"
    wait_until 20 test -b "/dev/$1/lv"
    udevadm settle --timeout 180
}

# lvm_quiet COMMAND...: LVM complains of descriptors that others left open.
lvm_quiet() {
    LVM_SUPPRESS_FD_WARNINGS=1 "$@" >/dev/null
}

# --- Domains: no operating system, so everything is done from outside -----------------------------------

# domain_define NAME [DISK_XML_FILE...]: 64 MiB, one virtio-scsi controller. It names no emulator.
domain_define() {
    local name=$1 definition
    shift
    definition=$(mktemp)
    cat >"$definition" <<XML
<domain type='qemu'>
  <name>$name</name>
  <memory unit='MiB'>64</memory>
  <vcpu>1</vcpu>
  <os><type arch='x86_64' machine='pc'>hvm</type></os>
  <devices>
    <controller type='usb' model='none'/>
    <controller type='scsi' model='virtio-scsi'/>
    <memballoon model='none'/>
$([ $# -eq 0 ] || cat "$@")
  </devices>
</domain>
XML
    virsh --quiet define "$definition" >/dev/null
    rm "$definition"
}

# domain_start NAME [OPTION...]
domain_start() {
    virsh --quiet start "$@"
}

# domain_destroy NAME
domain_destroy() {
    virsh --quiet destroy "$1"
}

# domain_undefine NAME
domain_undefine() {
    virsh --quiet undefine "$1"
}

# domain_pid NAME: the process id of its QEMU; fails if there is none.
domain_pid() {
    cat "/run/libvirt/qemu/$1.pid" 2>/dev/null
}

# disk_xml PATH TARGET_DEV [SERIAL]: a disk element as Nova writes it, on the SCSI bus, from which QEMU can
# take it away without the guest's consent.
disk_xml() {
    local path=$1 target=$2 serial=${3:-}
    cat <<XML
<disk type='block' device='disk'>
  <driver name='qemu' type='raw' cache='none' io='native'/>
  <source dev='$path'/>
  <target dev='$target' bus='scsi'/>
${serial:+  <serial>$serial</serial>}
</disk>
XML
}

# disk_attach NAME PATH TARGET_DEV [SERIAL]: to the running domain.
disk_attach() {
    local name=$1
    shift
    disk_xml "$@" | virsh --quiet attach-device "$name" /dev/stdin --live
}

# disk_detach NAME TARGET_DEV: from the running domain.
disk_detach() {
    virsh --quiet detach-disk "$1" "$2" --live
}

# qemu_io NAME TARGET_DEV COMMAND: reads or writes through QEMU's block layer, as the guest would, e.g.
# qemu_io vm sdb 'write -P 0xab 0 64k'. Prints what qemu-io says and fails if it says an error.
qemu_io() {
    local name=$1 target=$2 command=$3 alias log from said end
    alias=$(awk -F"'" -v target="$target" '
        /<disk / { here = 0 }
        /<target dev=/ { here = $2 == target }
        here && /<alias name=/ { print $2; exit }' "/run/libvirt/qemu/$name.xml")
    [ -n "$alias" ] || fail "domain $name has no disk $target"
    # qemu-io inside QEMU prints to QEMU's output, which virtlogd writes down; the monitor says nothing of it.
    # A second command that complains of a name nobody else uses marks the end.
    log=/var/log/libvirt/qemu/$name.log
    from=$(($(stat -c %s "$log") + 1))
    end=end-$SRANDOM
    virsh --quiet "qemu-monitor-command $name --hmp 'qemu-io -d $alias \"$command\"';
        qemu-monitor-command $name --hmp 'qemu-io -d $alias \"help $end\"'" | sed '/^$/d' || return
    wait_until 30 log_has "$log" "$from" "$end"
    said=$(tail -c "+$from" "$log" | sed "/$end/d; /is tainted: custom-monitor/d")
    echo "$said"
    ! grep -qiE 'fail|error|not found|invalid|non-numeric|not a |out of range|unaligned|expected' <<<"$said"
}

# log_has FILE FROM TEXT: whether TEXT is in FILE after byte FROM.
log_has() {
    grep -q "$3" <(tail -c "+$2" "$1")
}

# --- Order ------------------------------------------------------------------------------------------------

# lab_reset: no domain, no session, no target is left. Costs little where nothing is to be done.
lab_reset() {
    local path
    for path in /run/libvirt/qemu/*.xml; do
        [ ! -e "$path" ] || domain_destroy "$(basename "$path" .xml)" || true
    done
    for path in /etc/libvirt/qemu/*.xml; do
        [ ! -e "$path" ] || domain_undefine "$(basename "$path" .xml)" || true
    done
    if grep -qs '^LVM-' /sys/block/dm-*/dm/uuid; then
        lvm_quiet vgchange --quiet --activate n || true
    fi
    multipath_off
    if compgen -G '/sys/class/iscsi_session/*' >/dev/null; then
        iscsiadm --mode node --logoutall=all >/dev/null || true
    fi
    for path in "$lab_store"/*/; do
        [ ! -d "$path" ] || target_delete "$(basename "$path")"
    done
}
