use virt::connect::Connect;
use virt::domain::Domain;
use virt::error::{Error, ErrorNumber, clear_error_callback};
use virt::sys;
use volcrypt::cli::{Affect, Definition, Found, Operation};
use volcrypt::domain::is_uuid;

/// What libvirt keeps of the domain called `name`.
pub fn look(name: &str) -> Result<Option<Definition>, String> {
    with_connection(|connection| match Domain::lookup_by_name(connection, name) {
        Ok(domain) => Ok(Some(Definition {
            saved: domain.is_persistent()?.then(|| domain.get_xml_desc(SAVED)).transpose()?,
            running: domain.is_active()?,
        })),
        Err(error) if error.code() == ErrorNumber::NoDomain => Ok(None),
        Err(error) => Err(error),
    })
}

/// Has libvirt keep `xml` in the place of what it keeps of that domain.
pub fn define(xml: &str) -> Result<(), String> {
    with_connection(|connection| Domain::define_xml(connection, xml).map(drop))
}

/// The domain that is called `name`: by its id if that is a number, by its UUID, or by its name, as virsh takes it.
pub fn find(name: &str) -> Result<Option<Found>, String> {
    with_connection(|connection| {
        let by_id = name.parse().ok().map(|id| Domain::lookup_by_id(connection, id));
        let by_uuid = || is_uuid(name).then(|| Domain::lookup_by_uuid_string(connection, name));
        for found in [by_id, by_uuid(), Some(Domain::lookup_by_name(connection, name))].into_iter().flatten() {
            match found {
                Ok(domain) => {
                    let (name, uuid) = (domain.get_name()?, domain.get_uuid_string()?);
                    return Ok(Some(Found { name, uuid, xml: domain.get_xml_desc(0)?, running: domain.is_active()? }));
                }
                Err(error) if error.code() == ErrorNumber::NoDomain => {}
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    })
}

/// Has libvirt attach or detach a device.
pub fn change(uuid: &str, operation: Operation, device: &str, affect: Option<Affect>) -> Result<(), String> {
    let flags = affect.map(|Affect { live, config }| {
        let live = if live { sys::VIR_DOMAIN_AFFECT_LIVE } else { sys::VIR_DOMAIN_AFFECT_CURRENT };
        let config = if config { sys::VIR_DOMAIN_AFFECT_CONFIG } else { sys::VIR_DOMAIN_AFFECT_CURRENT };
        live | config
    });
    with_connection(|connection| {
        let domain = Domain::lookup_by_uuid_string(connection, uuid)?;
        let changed = match (operation, flags) {
            (Operation::Attach, Some(flags)) => domain.attach_device_flags(device, flags),
            (Operation::Attach, None) => domain.attach_device(device),
            (Operation::Detach, Some(flags)) => domain.detach_device_flags(device, flags),
            (Operation::Detach, None) => domain.detach_device(device),
        };
        changed.map(drop)
    })
}

/// Without its secrets a definition could not be given back to libvirt.
const SAVED: u32 = sys::VIR_DOMAIN_XML_INACTIVE | sys::VIR_DOMAIN_XML_SECURE;

fn with_connection<T>(work: impl FnOnce(&Connect) -> Result<T, Error>) -> Result<T, String> {
    // Otherwise libvirt writes every error to stderr itself.
    clear_error_callback();
    let done = Connect::open(Some("qemu:///system")).and_then(|connection| work(&connection));
    done.map_err(|error| format!("libvirt says: {}", error.message().trim_end()))
}
