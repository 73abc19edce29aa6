//! How this host shows to Keystone who it is (Identity API v3).

use serde::Serialize;
use zeroize::Zeroizing;

/// How this host shows who it is. The secret or the password is in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Credential {
    /// An application credential, by its id.
    Application(String),
    /// An application credential, by its name and its user's.
    NamedApplication {
        /// The credential's name.
        name: String,
        /// The user that it belongs to.
        user: String,
        /// The domain of that user.
        user_domain: String,
    },
    /// A user with a password, in a project.
    Password {
        /// The user's name.
        user: String,
        /// The domain of the user.
        user_domain: String,
        /// The project whose keys are meant.
        project: String,
        /// The domain of the project.
        project_domain: String,
    },
}

impl Credential {
    /// What Keystone is asked for a token with, `secret` being the credential's secret or the password.
    pub fn request(&self, secret: &str) -> Zeroizing<Vec<u8>> {
        let application = |id, name, user| IdentityPart {
            methods: ["application_credential"],
            application_credential: Some(ApplicationPart { id, name, secret, user }),
            password: None,
        };
        let user_part = |name, domain, password| UserPart { name, domain: Named { name: domain }, password };
        let (identity, scope) = match self {
            Credential::Application(id) => (application(Some(id.as_str()), None, None), None),
            Credential::NamedApplication { name, user, user_domain } => {
                (application(None, Some(name.as_str()), Some(user_part(user, user_domain, None))), None)
            }
            Credential::Password { user, user_domain, project, project_domain } => {
                let user = user_part(user, user_domain, Some(secret));
                let identity = IdentityPart {
                    methods: ["password"],
                    password: Some(PasswordPart { user }),
                    application_credential: None,
                };
                let project = ProjectPart { name: project, domain: Named { name: project_domain } };
                (identity, Some(Scope { project }))
            }
        };
        super::to_json(&Auth { auth: Inner { identity, scope } })
    }
}

#[derive(Serialize)]
struct Auth<'a> {
    auth: Inner<'a>,
}

#[derive(Serialize)]
struct Inner<'a> {
    identity: IdentityPart<'a>,
    #[serde(skip_serializing_if = "Option::is_none")]
    scope: Option<Scope<'a>>,
}

#[derive(Default, Serialize)]
struct IdentityPart<'a> {
    methods: [&'a str; 1],
    #[serde(skip_serializing_if = "Option::is_none")]
    application_credential: Option<ApplicationPart<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    password: Option<PasswordPart<'a>>,
}

#[derive(Serialize)]
struct ApplicationPart<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<&'a str>,
    secret: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    user: Option<UserPart<'a>>,
}

#[derive(Serialize)]
struct PasswordPart<'a> {
    user: UserPart<'a>,
}

#[derive(Serialize)]
struct UserPart<'a> {
    name: &'a str,
    domain: Named<'a>,
    #[serde(skip_serializing_if = "Option::is_none")]
    password: Option<&'a str>,
}

#[derive(Serialize)]
struct Scope<'a> {
    project: ProjectPart<'a>,
}

#[derive(Serialize)]
struct ProjectPart<'a> {
    name: &'a str,
    domain: Named<'a>,
}

#[derive(Serialize)]
struct Named<'a> {
    name: &'a str,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sent_is_what_keystone_documents() {
        let text = |credential: Credential| String::from_utf8(credential.request("s").to_vec()).unwrap();
        assert_eq!(
            text(Credential::Application("id".into())),
            r#"{"auth":{"identity":{"methods":["application_credential"],"application_credential":{"id":"id","secret":"s"}}}}"#
        );
        assert_eq!(
            text(Credential::NamedApplication { name: "n".into(), user: "u".into(), user_domain: "d".into() }),
            r#"{"auth":{"identity":{"methods":["application_credential"],"application_credential":{"name":"n","secret":"s","user":{"name":"u","domain":{"name":"d"}}}}}}"#
        );
        assert_eq!(
            text(Credential::Password {
                user: "u".into(),
                user_domain: "d".into(),
                project: "p".into(),
                project_domain: "e".into()
            }),
            r#"{"auth":{"identity":{"methods":["password"],"password":{"user":{"name":"u","domain":{"name":"d"},"password":"s"}}},"scope":{"project":{"name":"p","domain":{"name":"e"}}}}}"#
        );
    }
}
