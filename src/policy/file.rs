//! The file's shape. What the values mean, and which are refused, is decided elsewhere.

use std::collections::BTreeMap;

use serde::Deserialize;
use toml::Spanned;

use super::profile::Provider;

#[derive(Deserialize, Default)]
#[serde(default, deny_unknown_fields)]
pub(super) struct File {
    pub(super) key_manager: KeyManagerTable,
    pub(super) kmip: Option<Spanned<KmipTable>>,
    pub(super) barbican: Option<Spanned<BarbicanTable>>,
    pub(super) key_cache: KeyCacheTable,
    pub(super) daemon: DaemonTable,
    pub(super) hook: HookTable,
    pub(super) policy: PolicyTable,
    pub(super) guard: GuardTable,
    pub(super) audit: AuditTable,
    pub(super) profiles: BTreeMap<Spanned<String>, ProfileTable>,
    pub(super) rules: Vec<Spanned<RuleTable>>,
}

#[derive(Deserialize, Default)]
#[serde(default, deny_unknown_fields)]
pub(super) struct KeyManagerTable {
    #[serde(rename = "type")]
    pub(super) kind: Option<Spanned<String>>,
    pub(super) directory: Option<Spanned<String>>,
    pub(super) file: Option<Spanned<String>>,
    pub(super) i_know_this_is_insecure: Option<Spanned<bool>>,
}

#[derive(Deserialize, Default)]
#[serde(default, deny_unknown_fields)]
pub(super) struct KmipTable {
    pub(super) servers: Option<Spanned<Vec<Spanned<String>>>>,
    pub(super) ca: Option<Spanned<String>>,
    pub(super) certificate: Option<Spanned<String>>,
    pub(super) key: Option<Spanned<String>>,
    pub(super) key_origin: Option<Spanned<String>>,
    pub(super) newest_version: Option<Spanned<String>>,
    pub(super) wrapping_key: Option<Spanned<String>>,
    pub(super) wrapping_key_file: Option<Spanned<String>>,
    pub(super) deadline_seconds: Option<Spanned<i64>>,
}

#[derive(Deserialize, Default)]
#[serde(default, deny_unknown_fields)]
pub(super) struct BarbicanTable {
    pub(super) auth_url: Option<Spanned<String>>,
    pub(super) ca: Option<Spanned<String>>,
    pub(super) application_credential_id: Option<String>,
    pub(super) application_credential_name: Option<String>,
    pub(super) user: Option<String>,
    pub(super) user_domain: Option<String>,
    pub(super) project: Option<String>,
    pub(super) project_domain: Option<String>,
    pub(super) secret: Option<Spanned<String>>,
    pub(super) interface: Option<Spanned<String>>,
    pub(super) region: Option<String>,
    pub(super) deadline_seconds: Option<Spanned<i64>>,
    pub(super) volume_secrets: Option<Spanned<String>>,
}

#[derive(Deserialize, Default)]
#[serde(default, deny_unknown_fields)]
pub(super) struct KeyCacheTable {
    pub(super) lifetime_days: Option<Spanned<i64>>,
}

#[derive(Deserialize, Default)]
#[serde(default, deny_unknown_fields)]
pub(super) struct DaemonTable {
    pub(super) open_deadline_seconds: Option<Spanned<i64>>,
    pub(super) qemu_users: Option<Spanned<Vec<Spanned<String>>>>,
}

#[derive(Deserialize, Default)]
#[serde(default, deny_unknown_fields)]
pub(super) struct HookTable {
    pub(super) intercept: Option<Spanned<String>>,
    pub(super) when_daemon_unreachable: Option<Spanned<String>>,
    pub(super) other_emulators: Option<Spanned<String>>,
    pub(super) deadline_seconds: Option<Spanned<i64>>,
}

#[derive(Deserialize, Default)]
#[serde(default, deny_unknown_fields)]
pub(super) struct PolicyTable {
    pub(super) unmatched_iscsi: Option<Spanned<String>>,
    pub(super) export_keys: bool,
    pub(super) key_age_days: Option<Spanned<i64>>,
    pub(super) plaintext_targets: Vec<Spanned<String>>,
}

#[derive(Deserialize, Default)]
#[serde(default, deny_unknown_fields)]
pub(super) struct GuardTable {
    pub(super) enabled: Option<bool>,
    pub(super) cgroup: Option<Spanned<String>>,
}

#[derive(Deserialize, Default)]
#[serde(default, deny_unknown_fields)]
pub(super) struct AuditTable {
    pub(super) when_unwritable: Option<Spanned<String>>,
}

#[derive(Deserialize, Default)]
#[serde(default, deny_unknown_fields)]
pub(super) struct ProfileTable {
    pub(super) provider: Option<Provider>,
    pub(super) cipher: Option<Spanned<String>>,
    pub(super) key_size: Option<Spanned<i64>>,
    pub(super) sector_size: Option<Spanned<i64>>,
    pub(super) allow_discards: Option<bool>,
    pub(super) no_read_workqueue: Option<bool>,
    pub(super) no_write_workqueue: Option<bool>,
    pub(super) submit_from_crypt_cpus: Option<bool>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RuleTable {
    pub(super) name: Spanned<String>,
    pub(super) action: Option<Spanned<String>>,
    pub(super) iscsi_target: Option<Spanned<String>>,
    pub(super) lun: Option<Spanned<i64>>,
    pub(super) wwid: Option<Spanned<String>>,
    pub(super) dm_uuid: Option<Spanned<String>>,
    pub(super) domain: Option<Spanned<String>>,
    pub(super) owner: Option<Spanned<String>>,
    pub(super) volume_id: Option<Spanned<String>>,
    pub(super) profile: Option<Spanned<String>>,
    pub(super) create_keys: Option<Spanned<bool>>,
}
