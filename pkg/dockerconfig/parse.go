package dockerconfig

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// The two types of Secret that hold a docker config, and the data key that each has (k8s.io/api/core/v1).
const (
	TypeDockerConfigJSON = "kubernetes.io/dockerconfigjson"
	KeyDockerConfigJSON  = ".dockerconfigjson"
	TypeDockercfg        = "kubernetes.io/dockercfg"
	KeyDockercfg         = ".dockercfg"
)

// Parse reads a Secret's type and data: kubernetes.io/dockerconfigjson, {"auths": {<registry>: <entry>}}, or the
// older kubernetes.io/dockercfg, {<registry>: <entry>}. Other data keys are not looked at.
//
// An entry's fields are auth, username, password, identitytoken, registrytoken and email. As in the kubelet, field
// names match in any case, of a repeated key the last counts, null is the same as absent, and where auth is given it
// wins over username and password: base64, padded or not, of "username:password".
//
// The notes say, in printable sentences without credentials and at most eleven of them, what a kubelet does not use:
// left out are other top-level fields (credsStore, credHelpers, HttpHeaders, ...), keys that match no image, and
// entries without a credential (what docker writes when a credsStore holds it: were they kept, they would win over a
// real one in Merge); carried are tokens and a pair that auth contradicts.
//
// One entry that a kubelet cannot read fails the whole source, and the error names it. Errors are of class
// ErrSecretType, ErrTooLarge or ErrMalformed, and hold no part of the content but registry keys (without user
// information) and byte positions.
func Parse(secretType string, data map[string][]byte) (Config, []string, error) {
	key, where := KeyDockerConfigJSON, "auths"
	switch secretType {
	case TypeDockerConfigJSON:
	case TypeDockercfg:
		key, where = KeyDockercfg, KeyDockercfg
	default:
		return Config{}, nil, fmt.Errorf("%w: its type is %q; use %s or %s",
			ErrSecretType, bounded(secretType), TypeDockerConfigJSON, TypeDockercfg)
	}
	raw, ok := data[key]
	if !ok {
		return Config{}, nil, fmt.Errorf("%w: it has no key %s", ErrSecretType, key)
	}
	if len(raw) > MaxBytes {
		return Config{}, nil, fmt.Errorf("%w: %s has %d bytes, the limit is %d", ErrTooLarge, key, len(raw), MaxBytes)
	}

	var notes notes
	var auths map[string]json.RawMessage
	var err error
	if secretType == TypeDockercfg {
		err = decode(raw, &auths, key, "an object")
	} else {
		auths, err = decodeAuths(raw, &notes)
	}
	if err != nil {
		return Config{}, nil, err
	}
	if len(auths) > MaxEntries {
		return Config{}, nil, fmt.Errorf("%w: %s has %d registries, the limit is %d",
			ErrTooLarge, key, len(auths), MaxEntries)
	}

	entries := make([]Entry, 0, len(auths))
	for _, registry := range slices.Sorted(maps.Keys(auths)) { // sorted, so that the same input gives the same error
		name := fmt.Sprintf("%s[%q]", where, printable(registry))
		if len(registry) > MaxKeyBytes {
			return Config{}, nil, fmt.Errorf("%w: the key %s has %d bytes, the limit is %d",
				ErrTooLarge, name, len(registry), MaxKeyBytes)
		}
		e, contradiction, err := decodeEntry(auths[registry], name)
		if err != nil {
			return Config{}, nil, err
		}
		normal, err := Normalize(registry)
		if err != nil {
			notes.add("%s is left out: its key matches no image", name)
			continue
		}
		e.Key, e.normal = NewSensitive(registry), NewSensitive(normal)
		if !e.hasBasic() && !e.hasToken() {
			notes.add("%s is left out: it has no credential", name)
			continue
		}
		if contradiction {
			notes.add("%s: username and password differ from auth, and auth wins", name)
		}
		if e.hasToken() && e.Password.IsZero() {
			notes.add("%s has a token and no password: kubelets do not read tokens", name)
		}
		entries = append(entries, e)
	}
	return newConfig(entries), notes.all(), nil
}

// decodeAuths reads {"auths": {...}} and notes the other fields.
func decodeAuths(raw []byte, notes *notes) (map[string]json.RawMessage, error) {
	var config struct {
		Auths map[string]json.RawMessage `json:"auths"`
	}
	if err := decode(raw, &config, KeyDockerConfigJSON, "an object"); err != nil {
		return nil, err
	}
	var fields map[string]json.RawMessage
	if err := decode(raw, &fields, KeyDockerConfigJSON, "an object"); err != nil {
		return nil, err
	}
	for _, field := range slices.Sorted(maps.Keys(fields)) {
		if !strings.EqualFold(field, "auths") {
			notes.add("the field %q is left out: kubelets do not use it", printable(field))
		}
	}
	return config.Auths, nil
}

// decodeEntry reads the value of one registry. contradiction: username or password differ from auth.
func decodeEntry(raw []byte, name string) (e Entry, contradiction bool, err error) {
	var fields struct {
		Auth          string `json:"auth"`
		Username      string `json:"username"`
		Password      string `json:"password"`
		IdentityToken string `json:"identitytoken"`
		RegistryToken string `json:"registrytoken"`
		Email         string `json:"email"`
	}
	if err := decode(raw, &fields, name, "a string"); err != nil {
		return Entry{}, false, err
	}
	username, password := fields.Username, fields.Password
	if fields.Auth != "" {
		encoding := base64.RawStdEncoding
		if strings.Contains(fields.Auth, "=") {
			encoding = base64.StdEncoding
		}
		decoded, err := encoding.DecodeString(fields.Auth)
		if err != nil {
			return Entry{}, false, fmt.Errorf("%w: %s: auth is not base64", ErrMalformed, name)
		}
		var ok bool
		username, password, ok = strings.Cut(string(decoded), ":")
		if !ok {
			return Entry{}, false, fmt.Errorf("%w: %s: auth is not the base64 of username:password (it has no colon)",
				ErrMalformed, name)
		}
		contradiction = fields.Username != "" && fields.Username != username ||
			fields.Password != "" && fields.Password != password
	}
	return Entry{
		Username:      NewSensitive(username),
		Password:      NewSensitive(password),
		IdentityToken: NewSensitive(fields.IdentityToken),
		RegistryToken: NewSensitive(fields.RegistryToken),
		Email:         NewSensitive(fields.Email),
	}, contradiction, nil
}

// decode is json.Unmarshal with errors that hold nothing of the input: encoding/json's own quote characters and
// numbers. name says what raw is, and want what each field of into must be. Nesting is bounded by encoding/json.
func decode(raw []byte, into any, name, want string) error {
	err := json.Unmarshal(raw, into)
	if err == nil {
		return nil
	}
	if syntax, ok := errors.AsType[*json.SyntaxError](err); ok {
		return fmt.Errorf("%w: %s is not valid JSON at byte %d", ErrMalformed, name, syntax.Offset)
	}
	// The field's name is the one in the struct tag, not the input's.
	if wrong, ok := errors.AsType[*json.UnmarshalTypeError](err); ok && wrong.Field != "" {
		return fmt.Errorf("%w: %s: %s must be %s", ErrMalformed, name, wrong.Field, want)
	}
	return fmt.Errorf("%w: %s must be a JSON object", ErrMalformed, name)
}

// notes collects notes, of which a source could otherwise cause any number.
type notes struct {
	list []string
	more int
}

func (n *notes) add(format string, args ...any) {
	if len(n.list) == 10 {
		n.more++
		return
	}
	n.list = append(n.list, fmt.Sprintf(format, args...))
}

func (n *notes) all() []string {
	if n.more == 0 {
		return n.list
	}
	return append(n.list, fmt.Sprintf("and %d more", n.more))
}
