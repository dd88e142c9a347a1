package dockerconfig

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
)

// wireEntry is an entry as it is written. The pointers keep the two cases "absent" and "empty" apart: a username
// without a password still has all three keys.
type wireEntry struct {
	Username      *string `json:"username,omitempty"`
	Password      *string `json:"password,omitempty"`
	Auth          string  `json:"auth,omitempty"`
	IdentityToken string  `json:"identitytoken,omitempty"`
	RegistryToken string  `json:"registrytoken,omitempty"`
	Email         string  `json:"email,omitempty"`
}

// Render returns the value of a Secret's .dockerconfigjson: {"auths":{...}} with sorted keys and no white space. The
// same credentials give the same bytes, and Parse reads them back without a note about what was left out.
//
// An entry with a username or a password has username, password and auth, all three of the same pair, but where a
// form cannot hold the pair and a kubelet would read another from it:
//   - a username with a colon is written without auth, whose first colon ends the username;
//   - bytes that are not UTF-8 (they can only come from auth) are written as auth alone, as JSON strings cannot
//     hold them.
//
// The error is ErrTooLarge: more than MaxBytes fit into no Secret. One source that is small enough can render too
// large, as the pair is written twice.
func (c Config) Render() (Sensitive, error) {
	auths := make(map[string]wireEntry, len(c.entries))
	for _, e := range c.entries {
		auths[e.Key.Reveal()] = e.wire()
	}
	var buffer bytes.Buffer
	encoder := json.NewEncoder(&buffer) // sorts the keys of maps
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(map[string]any{"auths": auths}); err != nil {
		return Sensitive{}, fmt.Errorf("render docker config: %w", err)
	}
	rendered := bytes.TrimSuffix(buffer.Bytes(), []byte("\n"))
	if len(rendered) > MaxBytes {
		return Sensitive{}, fmt.Errorf("%w: %d registries render to %d bytes, a Secret holds %d",
			ErrTooLarge, len(c.entries), len(rendered), MaxBytes)
	}
	return NewSensitive(rendered), nil
}

func (e Entry) wire() wireEntry {
	w := wireEntry{
		IdentityToken: e.IdentityToken.Reveal(),
		RegistryToken: e.RegistryToken.Reveal(),
		Email:         e.Email.Reveal(),
	}
	if !e.hasBasic() {
		return w
	}
	username, password := e.Username.Reveal(), e.Password.Reveal()
	if e.isText() {
		w.Username, w.Password = &username, &password
	}
	if !e.colonInUsername() {
		w.Auth = base64.StdEncoding.EncodeToString([]byte(username + ":" + password))
	}
	return w
}
