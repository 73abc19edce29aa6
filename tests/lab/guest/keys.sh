# Helpers of the cases about where keys are. Sourced after volcrypt.sh, never run.
# shellcheck shell=bash
# shellcheck disable=SC2154 # Variables of guest/volcrypt.sh.

# credentials_take TEXT: what `key-servers credentials` printed, where the configuration looks for it.
credentials_take() {
    install -d -m 700 /etc/volcrypt/keys
    base64 --decode <<<"$1" | tar --extract --gzip --no-same-permissions --directory /etc/volcrypt/keys
    chmod 600 /etc/volcrypt/keys/*
}

# keys_on CONFIGURATION: the lab's LUNs are protected, and their keys are kept where these sections say.
keys_on() {
    protect
    echo "$1" >>"$volcrypt_config"
    systemctl restart volcryptd
}
