package ecr

import (
	"fmt"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/imps-node/imps/pkg/dockerconfig"
)

// canary stands for a credential. No test may find it where things are printed.
const canary = "canary-8c31f7-never-printed"

var (
	frankfurt = Scope{Partition: "aws", Region: "eu-central-1"}
	beijing   = Scope{Partition: "aws-cn", Region: "cn-north-1"}
)

func secret(edits ...string) map[string][]byte {
	data := map[string][]byte{keyAccountID: []byte("123456789012"), keyRegion: []byte("eu-central-1"), keyAccessKeyID: []byte("AKIA" + canary), keySecretKey: []byte(canary)}
	for _, edit := range edits {
		key, value, set := strings.Cut(edit, "=")
		if !set {
			delete(data, key)
			continue
		}
		data[key] = []byte(value)
	}
	return data
}

func TestParseSecret(t *testing.T) {
	t.Parallel()
	const role = "arn:aws:iam::210987654321:role/team/pull"
	tests := map[string]struct {
		edits   []string
		err     string
		ambient bool
		role    string
	}{
		"the keys of IMPS":                           {},
		"with a role":                                {edits: []string{"roleArn=" + role}, role: role},
		"with a role and an external ID":             {edits: []string{"roleArn=" + role, "externalID=a:b/c"}, role: role},
		"with a session token":                       {edits: []string{"sessionToken=" + canary}},
		"white space around values":                  {edits: []string{"accountID= 123456789012\n", "region=\teu-central-1 ", "accessKeyID=" + canary + "\n", "roleArn=\n"}},
		"an empty key pair: the ambient identity":    {edits: []string{"accessKeyID=", "secretKey="}, ambient: true},
		"an empty key pair and a role":               {edits: []string{"accessKeyID=", "secretKey= ", "roleArn=" + role}, ambient: true, role: role},
		"keys that nobody knows":                     {edits: []string{"more=" + canary}},
		"no account":                                 {edits: []string{"accountID"}, err: "no such key: accountID"},
		"no region":                                  {edits: []string{"region"}, err: "no such key: region"},
		"no access key":                              {edits: []string{"accessKeyID"}, err: "no such key: accessKeyID"},
		"no secret key":                              {edits: []string{"secretKey"}, err: "no such key: secretKey"},
		"an account that is none":                    {edits: []string{"accountID=12345"}, err: "12 digits"},
		"a region that is none":                      {edits: []string{"region=x"}, err: "accountID and region: not an ECR registry"},
		"an access key without a secret":             {edits: []string{"secretKey="}, err: "belong together"},
		"a secret without an access key":             {edits: []string{"accessKeyID="}, err: "belong together"},
		"a session token without keys":               {edits: []string{"accessKeyID=", "secretKey=", "sessionToken=x"}, err: "sessionToken without accessKeyID"},
		"an external ID without a role":              {edits: []string{"externalID=abc"}, err: "without a role"},
		"an external ID that is too short":           {edits: []string{"roleArn=" + role, "externalID=a"}, err: "external ID"},
		"a role that is none":                        {edits: []string{"roleArn=" + canary}, err: "the role should look like"},
		"a user for a role":                          {edits: []string{"roleArn=arn:aws:iam::210987654321:user/pull"}, err: "the role should look like"},
		"a role of another partition":                {edits: []string{"roleArn=arn:aws-cn:iam::210987654321:role/pull"}, err: "the role is of the partition aws-cn, the registry of aws"},
		"a line break in a key":                      {edits: []string{"secretKey=a\nb"}, err: "secretKey is longer than"},
		"a session token that is far too long":       {edits: []string{"sessionToken=" + strings.Repeat("x", maxKeyBytes+1)}, err: "sessionToken is longer than"},
		"a key with other characters than ASCII has": {edits: []string{"accessKeyID=é"}, err: "accessKeyID is longer than"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			registry, grant, err := ParseSecret(secret(test.edits...))
			if test.err != "" {
				require.ErrorContains(t, err, test.err)
				require.NotContains(t, err.Error(), canary)
				require.Zero(t, registry)
				return
			}
			require.NoError(t, err)
			require.Equal(t, "123456789012.dkr.ecr.eu-central-1.amazonaws.com", registry.Host)
			require.Equal(t, frankfurt, grant.Scope)
			require.Equal(t, test.ambient, grant.Ambient())
			require.Equal(t, test.role, grant.RoleARN)
			if !test.ambient {
				require.Contains(t, grant.AccessKeyID.Reveal(), canary)
				require.Equal(t, strings.TrimSpace(grant.AccessKeyID.Reveal()), grant.AccessKeyID.Reveal())
			}
			require.NotContains(t, fmt.Sprintf("%v %+v %#v %s", grant, grant, grant, grant.Who()), canary)
		})
	}
}

// Whatever changes who asks or where is another grant, and nothing else is.
func TestGrantsAreToldApartByAllThatTheyAre(t *testing.T) {
	t.Parallel()
	base := Identity{AccessKeyID: dockerconfig.NewSensitive("a"), SecretAccessKey: dockerconfig.NewSensitive("b")}
	with := func(edit func(*Identity)) Identity {
		i := base
		edit(&i)
		return i
	}
	const role = "arn:aws:iam::210987654321:role/"
	grants := map[string]Grant{
		"as it is":              {frankfurt, base},
		"in another region":     {Scope{Partition: "aws", Region: "eu-west-1"}, base},
		"in another partition":  {beijing, base},
		"in ECR Public":         {Scope{Partition: "aws", Region: "eu-central-1", Public: true}, base},
		"the ambient identity":  {frankfurt, Identity{}},
		"another access key":    {frankfurt, with(func(i *Identity) { i.AccessKeyID = dockerconfig.NewSensitive("c") })},
		"another secret":        {frankfurt, with(func(i *Identity) { i.SecretAccessKey = dockerconfig.NewSensitive("c") })},
		"a session":             {frankfurt, with(func(i *Identity) { i.SessionToken = dockerconfig.NewSensitive("c") })},
		"a role":                {frankfurt, with(func(i *Identity) { i.RoleARN = role + "a" })},
		"another role":          {frankfurt, with(func(i *Identity) { i.RoleARN = role + "b" })},
		"a role, by another ID": {frankfurt, with(func(i *Identity) { i.RoleARN, i.ExternalID = role+"a", dockerconfig.NewSensitive("xx") })},
		"the ambient's role":    {frankfurt, Identity{RoleARN: role + "a"}},
		"fields run together":   {frankfurt, Identity{AccessKeyID: dockerconfig.NewSensitive("ab")}},
	}
	seen := map[string]string{}
	for name, grant := range grants {
		id := grant.ID()
		require.Equal(t, id, grant.ID())
		require.Emptyf(t, seen[id], "%s and %s", name, seen[id])
		seen[id] = name
	}
}

func TestParseRegistries(t *testing.T) {
	t.Parallel()
	const frankfurtHost, beijingHost = "123456789012.dkr.ecr.eu-central-1.amazonaws.com", "123456789012.dkr.ecr.cn-north-1.amazonaws.com.cn"
	const role = "arn:aws:iam::210987654321:role/pull"
	for name, test := range map[string]struct {
		hosts          []string
		role, external string
		err            string
	}{
		"several":                       {[]string{frankfurtHost, beijingHost, "public.ecr.aws"}, "", "", ""},
		"with a role":                   {[]string{frankfurtHost}, " " + role + "\n", canary, ""},
		"none":                          {nil, "", "", "no registries are listed"},
		"one that is none":              {[]string{frankfurtHost, "ghcr.io"}, "", "", "ghcr.io: not an ECR registry"},
		"a role of another partition":   {[]string{frankfurtHost, beijingHost}, role, "", beijingHost + ": not an AWS identity: the role is of the partition aws, the registry of aws-cn"},
		"an external ID without a role": {[]string{frankfurtHost}, "", canary, "without a role"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			registries, grants, err := ParseRegistries(test.hosts, test.role, test.external)
			if test.err != "" {
				require.ErrorContains(t, err, test.err)
				require.NotContains(t, err.Error(), canary)
				require.Empty(t, grants)
				return
			}
			require.NoError(t, err)
			require.Len(t, registries, len(test.hosts))
			for i, host := range test.hosts {
				require.Equal(t, host, registries[i].Host)
				require.Equal(t, registries[i].Scope, grants[i].Scope)
				require.True(t, grants[i].Ambient())
				require.Equal(t, strings.TrimSpace(test.role), grants[i].RoleARN)
				require.Equal(t, test.external, grants[i].ExternalID.Reveal())
			}
		})
	}
}

func TestWho(t *testing.T) {
	t.Parallel()
	keys := Identity{AccessKeyID: dockerconfig.NewSensitive(canary), SecretAccessKey: dockerconfig.NewSensitive(canary)}
	require.Equal(t, "access key", keys.Who())
	require.Equal(t, "ambient", Identity{}.Who())
	keys.RoleARN = "arn:aws:iam::210987654321:role/pull"
	require.Equal(t, "arn:aws:iam::210987654321:role/pull", keys.Who())
}

func FuzzParseSecret(f *testing.F) {
	f.Add("123456789012", "eu-central-1", "AKIA", "s", "", "arn:aws:iam::210987654321:role/pull", "abc")
	f.Add(" 123456789012\n", "cn-north-1", "", "", "", "", "")
	f.Fuzz(func(t *testing.T, account, region, access, secretKey, session, role, external string) {
		registry, grant, err := ParseSecret(map[string][]byte{
			keyAccountID: []byte(account), keyRegion: []byte(region), keyAccessKeyID: []byte(access), keySecretKey: []byte(secretKey),
			keySessionToken: []byte(session), keyRoleARN: []byte(role), keyExternalID: []byte(external),
		})
		if err != nil {
			require.LessOrEqual(t, len(err.Error()), 500)
			require.NotContains(t, err.Error(), "\n")
			return
		}
		require.Equal(t, registry.Scope, grant.Scope)
		again, err := ParseRegistry(registry.Host)
		require.NoError(t, err)
		require.Equal(t, registry, again)
		_, err = NewGrant(grant.Scope, grant.Identity)
		require.NoError(t, err)
		require.Equal(t, strings.TrimSpace(access), grant.AccessKeyID.Reveal())
	})
}
