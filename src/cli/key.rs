use super::table::Table;
use super::time::utc;
use super::{CommandError, Daemon, Format, json};
use crate::keys::KeyInfo;
use crate::protocol::{Reply, Request};

pub(super) fn list(daemon: &Daemon<'_>, format: Format) -> Result<String, CommandError> {
    let keys = match daemon.call(&Request::Keys)? {
        Reply::Keys(keys) => keys,
        _ => return Err(CommandError::UnexpectedReply),
    };
    match format.json {
        true => json(&keys),
        false if keys.is_empty() => Ok("There is no key.\n".to_owned()),
        false => Ok(table(&keys)),
    }
}

fn table(keys: &[KeyInfo]) -> String {
    let mut table = Table::new(["VOLUME", "BITS", "VERSION", "CREATED", "STATE"]);
    for key in keys {
        table.push([
            key.volume.to_string(),
            key.key_size.bits().to_string(),
            key.version.to_string(),
            utc(key.created_at),
            if key.destroyed { "destroyed" } else { "usable" }.to_owned(),
        ]);
    }
    table.render()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_destroyed_key_is_told_from_a_usable_one() {
        let key = |destroyed| KeyInfo {
            volume: "vol-1".parse().unwrap(),
            key_size: 512.try_into().unwrap(),
            version: 1,
            created_at: 86_400,
            destroyed,
        };
        assert_eq!(
            table(&[key(false), key(true)]),
            "VOLUME  BITS  VERSION  CREATED               STATE\n\
             vol-1   512   1        1970-01-02T00:00:00Z  usable\n\
             vol-1   512   1        1970-01-02T00:00:00Z  destroyed\n"
        );
    }
}
