package ecr

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"regexp"
	"strings"

	"github.com/imps-node/imps/pkg/dockerconfig"
)

// Keys of banzaicloud/imps's Secret with AWS keys, of the type banzaicloud.io/aws-ecr-login-config. The first four must be there; sessionToken and externalID are imps's own.
const (
	keyAccountID    = "accountID"
	keyRegion       = "region"
	keyAccessKeyID  = "accessKeyID"
	keySecretKey    = "secretKey"
	keySessionToken = "sessionToken"
	keyRoleARN      = "roleArn"
	keyExternalID   = "externalID"
)

// ErrIdentity says that an identity is not complete, or not well-formed.
var ErrIdentity = errors.New("not an AWS identity")

// Identity is who asks for tokens: keys, or without any the ambient identity of the process itself (IRSA, Pod
// Identity, environment, profile, instance profile), and the role that it assumes first, if any.
type Identity struct {
	AccessKeyID     dockerconfig.Sensitive
	SecretAccessKey dockerconfig.Sensitive
	SessionToken    dockerconfig.Sensitive
	// RoleARN is assumed with the keys or the ambient identity.
	RoleARN string
	// ExternalID is sent with that. AWS does not treat it as a secret; still it is printed nowhere.
	ExternalID dockerconfig.Sensitive
}

// Ambient reports whether it is the identity of the process, be it to assume a role.
func (i Identity) Ambient() bool { return i.AccessKeyID.IsZero() }

// Grant is a token to ask for: by whom, and where.
type Grant struct {
	Scope
	Identity
}

// ID identifies a grant by everything that changes who asks or where, without telling any of it to whom does not know
// the rest: it is a hash, and belongs in no public place all the same.
func (g Grant) ID() string {
	hash := sha256.New()
	for _, field := range []string{
		g.Partition, g.Region, fmt.Sprint(g.Public), g.AccessKeyID.Reveal(), g.SecretAccessKey.Reveal(), g.SessionToken.Reveal(), g.RoleARN, g.ExternalID.Reveal(),
	} {
		_ = binary.Write(hash, binary.BigEndian, uint64(len(field))) // a hash fails no write
		hash.Write([]byte(field))
	}
	return hex.EncodeToString(hash.Sum(nil))
}

// Who returns the identity in words that are fit for errors, metrics and logs: the role, else what kind of identity it
// is. An access key's ID is no secret, but is of no more use than the name of its Secret.
func (i Identity) Who() string {
	switch {
	case i.RoleARN != "":
		return i.RoleARN
	case i.Ambient():
		return "ambient"
	default:
		return "access key"
	}
}

// roleARN is documented at https://docs.aws.amazon.com/STS/latest/APIReference/API_AssumeRole.html, externalID too.
var (
	roleARN    = regexp.MustCompile(`^arn:(aws[a-z-]*):iam::[0-9]{12}:role/[\w+=,.@/-]+$`)
	externalID = regexp.MustCompile(`^[\w+=,.@:/-]{2,}$`)
)

// maxKeyBytes bounds an access key, its secret and a session token; STS does not bound the last one.
const maxKeyBytes = 16 << 10

// NewGrant returns the grant of an identity in a scope. The error, ErrIdentity, names the field.
func NewGrant(scope Scope, identity Identity) (Grant, error) {
	g := Grant{Scope: scope, Identity: identity}
	switch {
	case identity.AccessKeyID.IsZero() != identity.SecretAccessKey.IsZero():
		return Grant{}, fmt.Errorf("%w: %s and %s belong together: give both, or leave both empty for the coordinator's own identity", ErrIdentity, keyAccessKeyID, keySecretKey)
	case identity.Ambient() && !identity.SessionToken.IsZero():
		return Grant{}, fmt.Errorf("%w: %s without %s", ErrIdentity, keySessionToken, keyAccessKeyID)
	case identity.RoleARN == "" && !identity.ExternalID.IsZero():
		return Grant{}, fmt.Errorf("%w: an external ID without a role", ErrIdentity)
	case !identity.ExternalID.IsZero() && (identity.ExternalID.Len() > 1224 || !externalID.MatchString(identity.ExternalID.Reveal())):
		return Grant{}, fmt.Errorf("%w: the external ID has other characters than letters, digits and _+=,.@:/-, or not 2 to 1224 of them", ErrIdentity)
	}
	for key, value := range map[string]dockerconfig.Sensitive{keyAccessKeyID: identity.AccessKeyID, keySecretKey: identity.SecretAccessKey, keySessionToken: identity.SessionToken} {
		if value.Len() > maxKeyBytes || strings.ContainsFunc(value.Reveal(), func(r rune) bool { return r <= ' ' || r > '~' }) {
			return Grant{}, fmt.Errorf("%w: %s is longer than %d bytes, or has a character that no key has", ErrIdentity, key, maxKeyBytes)
		}
	}
	if identity.RoleARN == "" {
		return g, nil
	}
	parts := roleARN.FindStringSubmatch(identity.RoleARN)
	switch {
	case parts == nil || len(identity.RoleARN) > 600: // a path may have 512 characters, a name 64
		return Grant{}, fmt.Errorf("%w: the role should look like arn:aws:iam::123456789012:role/name", ErrIdentity)
	case parts[1] != scope.Partition:
		return Grant{}, fmt.Errorf("%w: the role is of the partition %s, the registry of %s", ErrIdentity, parts[1], scope.Partition)
	}
	return g, nil
}

// ParseSecret returns what banzaicloud/imps's Secret with AWS keys asks for: a registry, and the grant that opens it. White space around
// values is forgiven. The error, ErrRegistry or ErrIdentity, names the key and never quotes a value of it.
func ParseSecret(data map[string][]byte) (Registry, Grant, error) {
	for _, key := range []string{keyAccountID, keyRegion, keyAccessKeyID, keySecretKey} {
		if _, ok := data[key]; !ok {
			return Registry{}, Grant{}, fmt.Errorf("%w: no such key: %s", ErrIdentity, key)
		}
	}
	value := func(key string) string { return strings.TrimSpace(string(data[key])) }
	registry, err := RegistryOf(value(keyAccountID), value(keyRegion))
	if err != nil {
		return Registry{}, Grant{}, fmt.Errorf("%s and %s: %w", keyAccountID, keyRegion, err)
	}
	grant, err := NewGrant(registry.Scope, Identity{
		AccessKeyID:     dockerconfig.NewSensitive(value(keyAccessKeyID)),
		SecretAccessKey: dockerconfig.NewSensitive(value(keySecretKey)),
		SessionToken:    dockerconfig.NewSensitive(value(keySessionToken)),
		RoleARN:         value(keyRoleARN),
		ExternalID:      dockerconfig.NewSensitive(value(keyExternalID)),
	})
	if err != nil {
		return Registry{}, Grant{}, err
	}
	return registry, grant, nil
}

// ParseRegistries returns the registries that hosts name, and the grants that open them for an ambient identity, which
// may assume a role first. It is the inline form of an ECR source. The error, ErrRegistry or ErrIdentity, tells the first
// that is wrong.
func ParseRegistries(hosts []string, roleARN, externalID string) ([]Registry, []Grant, error) {
	if len(hosts) == 0 {
		return nil, nil, fmt.Errorf("%w: no registries are listed", ErrRegistry)
	}
	identity := Identity{RoleARN: strings.TrimSpace(roleARN), ExternalID: dockerconfig.NewSensitive(strings.TrimSpace(externalID))}
	var registries []Registry
	var grants []Grant
	for _, host := range hosts {
		registry, err := ParseRegistry(host)
		if err != nil {
			return nil, nil, err
		}
		grant, err := NewGrant(registry.Scope, identity)
		if err != nil {
			return nil, nil, fmt.Errorf("%s: %w", host, err)
		}
		registries, grants = append(registries, registry), append(grants, grant)
	}
	return registries, grants, nil
}
