# shellcheck shell=bash
# Many at once: four domains, eight protected volumes for each, all on one target, made at their first use.
# limit: 1800
# machine: second
# takes: 720

many_domains=4
many_luns=8

# at_once COMMAND [LUNS]: runs `COMMAND DOMAIN LUN` for every LUN of its domain, or for the first LUNS of them,
# all at the same time; a LUN stands as sdb and further in its domain. libvirt does one thing at a time to a
# domain and lets nobody wait for more than half a minute: whoever it sends away with that sentence comes
# again. Nothing else may fail.
at_once() {
    local number index round left=()
    for ((number = 0; number < many_domains; number++)); do
        for ((index = 0; index < ${2:-$many_luns}; index++)); do
            left+=("$number $index")
        done
    done
    rm -f /run/lab-many.*
    for ((round = 0; ${#left[@]} > 0; round++)); do
        [ "$round" -lt 8 ] || fail "$1: libvirt's lock is never free: $(cat /run/lab-many.*)"
        mapfile -t left < <(try_at_once "$1" "${left[@]}")
        [ "${left[*]}" != wrong ] || fail "$1 did not succeed everywhere: $(cat /run/lab-many.*)"
        echo "$1: ${#left[@]} have to come again"
    done
}

# try_at_once COMMAND 'DOMAIN LUN'...: one round; prints those that libvirt's lock kept out, or `wrong`.
try_at_once() {
    local pair jobs=() again=()
    for pair in "${@:2}"; do
        # shellcheck disable=SC2086 # A domain and a LUN.
        "$1" $pair >"/run/lab-many.${pair/ /.}" 2>&1 &
        jobs+=($!)
    done
    for pair in "${@:2}"; do
        wait "${jobs[0]}" || {
            grep -q 'cannot acquire state change lock' "/run/lab-many.${pair/ /.}" || {
                wait
                echo wrong
                return
            }
            again+=("$pair")
        }
        jobs=("${jobs[@]:1}")
    done
    [ ${#again[@]} -eq 0 ] || printf '%s\n' "${again[@]}"
}

# The disk's name in its domain, and the byte that fills the beginning of a LUN.
target() {
    printf 'sd%b' "\\x$(printf %x $((0x62 + $1)))"
}

byte() {
    printf '0x%02x' $((0xa0 + $1))
}

lun_of() {
    echo $(($1 * many_luns + $2))
}

attach() {
    disk_attach "m$1" "$(lun_path prot-many "$(lun_of "$1" "$2")")" "$(target "$2")"
}

# The same LUN to the domain that is next.
attach_to_next() {
    disk_attach "m$((($1 + 1) % many_domains))" "$(lun_path prot-many "$(lun_of "$1" "$2")")" "$(target "$2")"
}

detach() {
    disk_detach "m$1" "$(target "$2")"
}

detach_from_next() {
    detach $((($1 + 1) % many_domains)) "$2"
}

# each_disk FUNCTION [LUNS]: `FUNCTION DOMAIN LUN`, one disk after the other, the domains side by side.
each_disk() {
    local job number index jobs=()
    for ((number = 0; number < many_domains; number++)); do
        for ((index = 0; index < ${2:-$many_luns}; index++)); do
            "$1" "$number" "$index"
        done >/dev/null &
        jobs+=($!)
    done
    for job in "${jobs[@]}"; do
        wait "$job" || fail "$1"
    done
}

write() {
    qemu_io "m$1" "$(target "$2")" "write -P $(byte "$(lun_of "$1" "$2")") 0 64k"
}

read_in_next() {
    qemu_io "m$((($1 + 1) % many_domains))" "$(target "$2")" "read -P $(byte "$(lun_of "$1" "$2")") 0 64k"
}

mapped() {
    mappings | wc -l
}

case_started_at_once() {
    local job number disk jobs=()
    protect 'create_keys = true'
    target_create prot-many 4 $((many_domains * many_luns + many_domains))
    target_login prot-many
    for ((number = 0; number < many_domains; number++)); do
        disk=$(mktemp)
        {
            disk_xml "$(lun_path prot-many $((many_domains * many_luns + number)))" sda
            # libvirt counts seven disks to a controller.
            echo "<controller type='scsi' index='1' model='virtio-scsi'/>"
        } >"$disk"
        domain_define "m$number" "$disk"
        domain_start "m$number" &
        jobs+=($!)
    done
    for job in "${jobs[@]}"; do
        wait "$job" || fail 'a domain did not start'
    done
    expect_eq "$(mapped)" "$many_domains" mappings
    expect_eq "$(systemctl show --property=NFileDescriptorStore --value volcryptd)" "$many_domains" 'stored listeners'
}

case_attached_at_once() {
    at_once attach
    expect_eq "$(mapped)" $((many_domains * many_luns + many_domains)) mappings
    each_disk write
}

case_detached_at_once() {
    at_once detach
    wait_until 20 only_those_from_the_start
}

only_those_from_the_start() {
    [ "$(mapped)" = "$many_domains" ]
}

# No plaintext on any LUN, neither its own nor another's, and no two with the same ciphertext.
case_every_lun_has_its_own_data() {
    local lun
    sync
    for ((lun = 0; lun < many_domains * many_luns; lun++)); do
        expect_eq "$(blank_from_64k "$(lun_backing prot-many "$lun")")" 0 "bytes on LUN $lun behind what was written"
    done
    for ((lun = 0; lun < many_domains * many_luns; lun++)); do
        head -c 64K "$(lun_backing prot-many "$lun")" | sha256sum
    done | sort | uniq --repeated >/run/lab-many.same
    expect_eq "$(cat /run/lab-many.same)" '' 'ciphertexts that are the same'
    ! LC_ALL=C grep -lP '([\xa0-\xbf])\1{31}' "$(dirname "$(lun_backing prot-many)")"/* ||
        fail 'plaintext stands on a LUN'
}

# blank_from_64k FILE: how many bytes behind the first 64 KiB are not zero.
blank_from_64k() {
    tail -c +65537 "$1" | tr -d '\0' | wc -c
}

case_read_in_other_domains() {
    at_once attach_to_next 2
    each_disk read_in_next 2
    at_once detach_from_next 2
    wait_until 20 only_those_from_the_start
}

case_all_ends_at_once() {
    local number
    for ((number = 0; number < many_domains; number++)); do
        domain_destroy "m$number" &
    done
    wait
    nothing_left
    expect_eq "$(volcrypt status --json | jq '.guests | length')" 0 guests
}
