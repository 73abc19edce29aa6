use std::path::Path;

use super::{CommandError, identify};
use crate::domain::{Facts, Nobody, Requester};
use crate::guest::block_device_at;
use crate::policy::Config;
use crate::volume::Sysfs;

/// Says how the configuration decides on a device, without the daemon: a file can be tried before it is
/// put in its place.
pub(super) fn test(config: &Path, device: &Path, domain: Option<Facts>) -> Result<String, CommandError> {
    let config = Config::load(config).map_err(CommandError::Configuration)?;
    let number =
        block_device_at(device).map_err(|source| CommandError::NoDevice { path: device.to_owned(), source })?;
    let portrait = Sysfs::system().portray(number).map_err(CommandError::Refused)?;
    let requester: &dyn Requester = domain.as_ref().map_or(&Nobody, |domain| domain);
    Ok(identify::judgement(&portrait, &config, requester))
}
