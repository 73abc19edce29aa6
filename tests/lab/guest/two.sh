# Helpers of the cases with two machines: a network, a libvirtd that the other host reaches, a guest that works on its
# disk. Sourced after volcrypt.sh, never run.
# shellcheck shell=bash
# shellcheck disable=SC2154 # Variables of guest/lib.sh.

lab_network=192.168.77

# --- Hosts ------------------------------------------------------------------------------------------------

# host_join NUMBER: this machine is hv1 or hv2 from now on. Both come from one image, and storage server and libvirt
# tell hosts apart by their names.
host_join() {
    hostname "hv$1"
    printf '%s\n' '127.0.0.1 localhost' "$lab_network.1 hv1" "$lab_network.2 hv2" >/etc/hosts
    ip address replace "$lab_network.$1/24" dev eth0
    ip link set eth0 up
    echo "InitiatorName=$lab_iqn:hv$1" >/etc/iscsi/initiatorname.iscsi
    systemctl stop iscsid.socket iscsid.service
    systemctl start iscsid.socket
    # Without any protection, for this network has nobody else on it.
    grep -q '^auth_tcp' /etc/libvirt/libvirtd.conf || echo 'auth_tcp = "none"' >>/etc/libvirt/libvirtd.conf
    systemctl stop libvirtd.socket libvirtd-ro.socket libvirtd-admin.socket libvirtd.service
    systemctl start libvirtd.socket libvirtd-tcp.socket
}

# target_join NAME: logs in to a target of the other host's.
target_join() {
    iscsi_node "$1" --op new >/dev/null
    iscsi_node "$1" --login >/dev/null
    wait_until 30 test -b "$(lun_path "$1")"
    udevadm settle --timeout 180
}

# keys_show: all that a host needs to open its volumes, as text.
keys_show() {
    volcrypt key backup /root/for-host2.db >/dev/null
    tar --create --gzip --directory /root for-host2.db --directory /var/lib/volcrypt kek | base64 --wrap 0
    rm /root/for-host2.db
}

# keys_take TEXT: takes over what keys_show printed, as the README says.
keys_take() {
    systemctl stop volcryptd.socket volcryptd-control.socket volcryptd
    mv -n /var/lib/volcrypt/kek "/var/lib/volcrypt/kek.replaced-$(date +%s)"
    base64 --decode <<<"$1" | tar --extract --gzip --directory /root
    install -m 600 /root/kek /var/lib/volcrypt/kek
    volcrypt key restore /root/for-host2.db
    shred -u /root/for-host2.db /root/kek
    systemctl start volcryptd.socket volcryptd-control.socket volcryptd
}

# nothing_here: no domain, no mapping, no key is on this host.
nothing_here() {
    wait_until 60 no_domain
    nothing_left
}

no_domain() {
    [ -z "$(virsh list --all --name)" ] && ! pgrep -f 'qemu-system-.* -name guest=' >/dev/null
}

# migrate_to HOST [OPTION...]: the domain `vm`, which runs here.
migrate_to() {
    virsh --quiet migrate --live vm "qemu+tcp://$1/system" "${@:2}"
}

# --- A guest ----------------------------------------------------------------------------------------------
# It is a boot sector, written for real mode. Round by round it reads the sector that it wrote last, stops if that is
# not what it was, and writes the next one full of the round's number: those after the eighth, 128 of them in a circle.
# They are so near to the first one that a QEMU that reads that one at its start has them in a page cache if it has one.
# The number of the round is at 0x7e00, and behind it the word `stop` once it has stopped.
#
#     start:  cli; xor ax,ax; mov ds,ax; mov es,ax; mov ss,ax; mov sp,0x7c00; sti; cld
#             mov [drive],dl; mov dword [0x7e00],0
#     next:   mov eax,[0x7e00]; test eax,eax; jz write
#             call place; mov ah,0x42; mov word [packet+4],0x9000; call disk      ; read what was written last
#             mov si,0x8000; mov di,0x9000; mov cx,128; repe cmpsd; jne stop
#     write:  inc dword [0x7e00]; mov eax,[0x7e00]; mov di,0x8000; mov cx,128; rep stosd
#             call place; mov word [packet+4],0x8000; mov ah,0x43; call disk; jmp next
#     place:  mov eax,[0x7e00]; and eax,127; add eax,8; mov [packet+8],eax; ret
#     disk:   xor al,al; mov dl,[drive]; mov si,packet; int 0x13; jc stop; ret
#     stop:   mov dword [0x7e04],'stop'; hlt; jmp $-1
#     packet: db 16,0; dw 1,0,0; dd 8,0
#     drive:  db 0
lab_guest='
fa31c08ed88ec08ed0bc007cfbfc88169d7c66c706007e0000000066a1007e6685c0741ce83b00b442c706917c0090e84100be0080bf0090b9800066f3a77541
66ff06007e66a1007ebf0080b9800066f3abe80d00c706917c0080b443e81300ebb966a1007e6683e07f6683c00866a3957cc330c08a169d7cbe8d7ccd137201
c366c706047e73746f70f4ebfd10000100000000000800000000000000'

# guest_install PATH: makes a disk boot that guest.
guest_install() {
    {
        xxd -revert -plain <<<"$lab_guest"
        head -c 353 /dev/zero
        printf '\125\252'
    } | head -c 512 | dd of="$1" bs=512 conv=notrunc,fsync iflag=fullblock status=none
    expect_eq "$(xxd -plain -seek 510 -len 2 "$1")" 55aa 'end of the boot sector'
}

# guest_rounds DOMAIN: how many sectors the guest has written; fails if it has stopped.
guest_rounds() {
    local words
    words=$(virsh --quiet qemu-monitor-command "$1" --hmp 'xp /2wx 0x7e00' | sed -n 's/.*: 0x\([0-9a-f]*\) 0x\([0-9a-f]*\).*/\1 \2/p')
    [ "${words#* }" = 00000000 ] || fail "the guest has stopped: a sector was not as it was written ($words)"
    echo $((16#${words% *}))
}

# guest_works DOMAIN: the guest goes on to write and verify.
guest_works() {
    local rounds
    rounds=$(guest_rounds "$1")
    wait_until 60 guest_past "$1" $((rounds + 2))
}

guest_past() {
    [ "$(guest_rounds "$1")" -ge "$2" ]
}

# guest_disk_is_right PATH: each sector that the guest wrote is whole, and the 127 that it wrote before its last one are
# all there.
guest_disk_is_right() {
    python3 - "$1" <<'PYTHON'
import struct, sys
with open(sys.argv[1], "rb") as disk:
    disk.seek(8 * 512)
    sectors = [struct.unpack("<128I", disk.read(512)) for _ in range(128)]
for place, sector in enumerate(sectors):
    assert len(set(sector)) == 1, f"sector {place} is of two rounds: {set(sector)}"
    assert sector[0] % 128 == place, f"sector {place} is of round {sector[0]}"
newest = max(sector[0] for sector in sectors)
assert newest > 128, f"there were {newest} rounds only"
lost = [sector[0] for sector in sectors if sector[0] <= newest - 128]
assert not lost, f"the newest round is {newest}, and what came after these is lost: {lost}"
print(f"{newest} rounds")
PYTHON
}
