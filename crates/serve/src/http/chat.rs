//! Chats as one text: a template in Jinja, as Hugging Face's are, of the run or of the configuration.

use minijinja::value::{Value, from_args};
use minijinja::{Environment, ErrorKind, State, context};

use super::error::{Answer, ApiError};
use super::fields::{Content, Message};
use crate::http::Error;

const NAME: &str = "chat_template.jinja";

/// A template of chats. It sees `messages` (`role`, `content` and `name` of each), `add_generation_prompt` (true),
/// `bos_token` (empty: it is put there anyway) and `eos_token`, and may call `raise_exception(message)`.
pub struct ChatTemplate {
    environment: Environment<'static>,
    eos_token: String,
}

impl ChatTemplate {
    /// Parses a template; `eos_token` is the spelling of the end-of-text token.
    ///
    /// # Errors
    /// [`Error::Template`] with the place of what is wrong.
    pub fn new(text: String, eos_token: String) -> Result<Self, Error> {
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_unknown_method_callback(method);
        environment.add_function("raise_exception", |message: String| -> Result<Value, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        let wrong = |error: minijinja::Error| Error::Template(error.to_string());
        environment.add_template_owned(NAME, text).map_err(wrong)?;
        Ok(Self { environment, eos_token })
    }

    /// The text that the answer to the messages continues.
    pub(super) fn render(&self, messages: &[Message]) -> Answer<String> {
        let message = |message: &Message| -> Answer<Value> {
            let (role, name, content) = (&message.role, &message.name, text_of(message)?);
            Ok(context! { role, name, content })
        };
        let messages = messages.iter().map(message).collect::<Answer<Vec<Value>>>()?;
        let (add_generation_prompt, bos_token, eos_token) = (true, "", &self.eos_token);
        let context = context! { messages, add_generation_prompt, bos_token, eos_token };
        let template = self.environment.get_template(NAME).map_err(ApiError::internal)?;
        template.render(context).map_err(|error| match error.kind() {
            ErrorKind::InvalidOperation => ApiError::field("messages", error),
            _ => ApiError::internal(format!("the chat template: {error}")),
        })
    }
}

/// What the messages say, one a line, without the words of the template.
pub(super) fn said(messages: &[Message]) -> Answer<String> {
    let texts = messages.iter().map(text_of).collect::<Answer<Vec<String>>>()?;
    Ok(texts.join("\n"))
}

fn text_of(message: &Message) -> Answer<String> {
    match &message.content {
        None => Ok(String::new()),
        Some(Content::Text(text)) => Ok(text.clone()),
        Some(Content::Parts(parts)) => {
            let text = |part: &super::fields::Part| match (part.kind.as_str(), &part.text) {
                ("text", Some(text)) => Ok(text.clone()),
                (kind, _) => {
                    let kind: String = kind.chars().take(40).collect();
                    Err(ApiError::field(
                        "messages",
                        format!("expected parts of type \"text\", found {kind:?}"),
                    ))
                }
            };
            Ok(parts.iter().map(text).collect::<Answer<Vec<String>>>()?.concat())
        }
    }
}

/// The methods of Python's strings that templates use.
fn method(_: &State<'_, '_>, value: &Value, method: &str, args: &[Value]) -> Result<Value, minijinja::Error> {
    let unknown = || minijinja::Error::new(ErrorKind::UnknownMethod, format!("no method {method}"));
    let text = value.as_str().ok_or_else(unknown)?;
    let one = || from_args::<(&str,)>(args).map(|(arg,)| arg);
    let none = || from_args::<()>(args);
    Ok(match method {
        "strip" => none().map(|()| Value::from(text.trim()))?,
        "lstrip" => none().map(|()| Value::from(text.trim_start()))?,
        "rstrip" => none().map(|()| Value::from(text.trim_end()))?,
        "upper" => none().map(|()| Value::from(text.to_uppercase()))?,
        "lower" => none().map(|()| Value::from(text.to_lowercase()))?,
        "startswith" => Value::from(text.starts_with(one()?)),
        "endswith" => Value::from(text.ends_with(one()?)),
        "split" => Value::from(text.split(one()?).map(str::to_owned).collect::<Vec<_>>()),
        "replace" => {
            let (from, to) = from_args::<(&str, &str)>(args)?;
            Value::from(text.replace(from, to))
        }
        _ => return Err(unknown()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn messages(text: &str) -> Vec<Message> {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn messages_become_one_text_that_ends_where_the_answer_begins() {
        let text = "{%- for m in messages %}\n{{ m.role.upper() }}: {{ m.content.strip() }}{{ eos_token }}\n{% endfor %}\n\
                    {% if add_generation_prompt %}ASSISTANT:{% endif %}";
        let template = ChatTemplate::new(text.into(), "<e>".into()).unwrap();
        let chat = messages(
            r#"[{"role": "system", "content": " be <brief> "},
                {"role": "user", "content": [{"type": "text", "text": "hi"}]}]"#,
        );
        assert_eq!(template.render(&chat).unwrap(), "SYSTEM: be <brief><e>\nUSER: hi<e>\nASSISTANT:");
        assert_eq!(said(&chat).unwrap(), " be <brief> \nhi");
    }

    #[test]
    fn what_a_template_refuses_is_the_callers_mistake_and_its_own_is_ours() {
        let refuses = ChatTemplate::new("{{ raise_exception('no system') }}".into(), String::new()).unwrap();
        let chat = messages(r#"[{"role": "user", "content": "a"}]"#);
        let error = refuses.render(&chat).unwrap_err();
        assert_eq!(error.status.as_u16(), 400);
        assert!(error.message.contains("no system"));
        let image = messages(r#"[{"role": "user", "content": [{"type": "image_url"}]}]"#);
        assert!(refuses.render(&image).unwrap_err().message.contains("found \"image_url\""));
        let broken = ChatTemplate::new("{{ messages[0].content.foo() }}".into(), String::new()).unwrap();
        assert_eq!(broken.render(&chat).unwrap_err().status.as_u16(), 500);
        assert!(ChatTemplate::new("{% if %}".into(), String::new()).is_err());
    }
}
