use virt::connect::Connect;
use virt::domain::Domain;
use virt::error::{Error, ErrorNumber, clear_error_callback};
use virt::sys;
use volcrypt::cli::Definition;

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

/// Without its secrets a definition could not be given back to libvirt.
const SAVED: u32 = sys::VIR_DOMAIN_XML_INACTIVE | sys::VIR_DOMAIN_XML_SECURE;

fn with_connection<T>(work: impl FnOnce(&Connect) -> Result<T, Error>) -> Result<T, String> {
    // Otherwise libvirt writes every error to stderr itself.
    clear_error_callback();
    let done = Connect::open(Some("qemu:///system")).and_then(|connection| work(&connection));
    done.map_err(|error| format!("libvirt says: {}", error.message().trim_end()))
}
