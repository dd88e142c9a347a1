package ecr

import (
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/stretchr/testify/require"
)

func TestParseRegistry(t *testing.T) {
	t.Parallel()
	const account = "123456789012"
	tests := map[string]struct {
		host   string
		scope  Scope
		public bool
		err    string
	}{
		"a usual one":                   {host: account + ".dkr.ecr.eu-central-1.amazonaws.com", scope: Scope{Partition: "aws", Region: "eu-central-1"}},
		"a region with two digits":      {host: account + ".dkr.ecr.us-east-10.amazonaws.com", scope: Scope{Partition: "aws", Region: "us-east-10"}},
		"a region that is new":          {host: account + ".dkr.ecr.nz-south-1.amazonaws.com", scope: Scope{Partition: "aws", Region: "nz-south-1"}},
		"FIPS":                          {host: account + ".dkr.ecr-fips.us-east-1.amazonaws.com", scope: Scope{Partition: "aws", Region: "us-east-1"}},
		"dual stack":                    {host: account + ".dkr-ecr.us-west-2.on.aws", scope: Scope{Partition: "aws", Region: "us-west-2"}},
		"dual stack and FIPS":           {host: account + ".dkr-ecr-fips.us-west-2.on.aws", scope: Scope{Partition: "aws", Region: "us-west-2"}},
		"GovCloud":                      {host: account + ".dkr.ecr.us-gov-west-1.amazonaws.com", scope: Scope{Partition: "aws-us-gov", Region: "us-gov-west-1"}},
		"GovCloud, dual stack":          {host: account + ".dkr-ecr.us-gov-east-1.on.aws", scope: Scope{Partition: "aws-us-gov", Region: "us-gov-east-1"}},
		"China":                         {host: account + ".dkr.ecr.cn-northwest-1.amazonaws.com.cn", scope: Scope{Partition: "aws-cn", Region: "cn-northwest-1"}},
		"China, dual stack":             {host: account + ".dkr-ecr.cn-north-1.on.amazonwebservices.com.cn", scope: Scope{Partition: "aws-cn", Region: "cn-north-1"}},
		"the European sovereign cloud":  {host: account + ".dkr.ecr.eusc-de-east-1.amazonaws.eu", scope: Scope{Partition: "aws-eusc", Region: "eusc-de-east-1"}},
		"ISO":                           {host: account + ".dkr.ecr.us-iso-east-1.c2s.ic.gov", scope: Scope{Partition: "aws-iso", Region: "us-iso-east-1"}},
		"ISO B":                         {host: account + ".dkr.ecr.us-isob-east-1.sc2s.sgov.gov", scope: Scope{Partition: "aws-iso-b", Region: "us-isob-east-1"}},
		"ISO E":                         {host: account + ".dkr.ecr.eu-isoe-west-1.cloud.adc-e.uk", scope: Scope{Partition: "aws-iso-e", Region: "eu-isoe-west-1"}},
		"ISO F":                         {host: account + ".dkr.ecr.us-isof-south-1.csp.hci.ic.gov", scope: Scope{Partition: "aws-iso-f", Region: "us-isof-south-1"}},
		"ECR Public":                    {host: "public.ecr.aws", scope: Scope{Partition: "aws", Region: "us-east-1", Public: true}, public: true},
		"ECR Public, dual stack":        {host: "ecr-public.aws.com", scope: Scope{Partition: "aws", Region: "us-east-1", Public: true}, public: true},
		"nothing":                       {host: "", err: "it should look like"},
		"another registry":              {host: "ghcr.io", err: "ghcr.io: not an ECR registry: it should look like"},
		"a look-alike behind":           {host: account + ".dkr.ecr.eu-central-1.amazonaws.com.evil.io", err: "end in .amazonaws.com"},
		"a look-alike before":           {host: "evil." + account + ".dkr.ecr.eu-central-1.amazonaws.com", err: "it should look like"},
		"a look-alike of ECR Public":    {host: "public.ecr.aws.evil.io", err: "it should look like"},
		"a prefix of ECR Public":        {host: "xpublic.ecr.aws", err: "it should look like"},
		"user information":              {host: "u:hunter2@" + account + ".dkr.ecr.eu-central-1.amazonaws.com", err: "a name that is no host name in lower case"},
		"a port":                        {host: account + ".dkr.ecr.eu-central-1.amazonaws.com:443", err: "without scheme, port and path"},
		"a scheme":                      {host: "https://" + account + ".dkr.ecr.eu-central-1.amazonaws.com", err: "without scheme, port and path"},
		"a path":                        {host: account + ".dkr.ecr.eu-central-1.amazonaws.com/app", err: "without scheme, port and path"},
		"a trailing dot":                {host: account + ".dkr.ecr.eu-central-1.amazonaws.com.", err: "end in .amazonaws.com"},
		"a trailing newline":            {host: account + ".dkr.ecr.eu-central-1.amazonaws.com\n", err: "a name that is no host name"},
		"upper case":                    {host: account + ".dkr.ecr.EU-central-1.amazonaws.com", err: "in lower case"},
		"Unicode that looks alike":      {host: account + ".dkr.ecr.eu-central-1.аmazonaws.com", err: "no host name"},
		"digits that are not ASCII":     {host: "１23456789012.dkr.ecr.eu-central-1.amazonaws.com", err: "no host name"},
		"an account with eleven digits": {host: "12345678901.dkr.ecr.eu-central-1.amazonaws.com", err: "it should look like"},
		"an account with thirteen":      {host: account + "3.dkr.ecr.eu-central-1.amazonaws.com", err: "it should look like"},
		"the API's host":                {host: "api.ecr.eu-central-1.amazonaws.com", err: "it should look like"},
		"another service":               {host: account + ".dkr.ecs.eu-central-1.amazonaws.com", err: "it should look like"},
		"China without its suffix":      {host: account + ".dkr.ecr.cn-north-1.amazonaws.com", err: "hosts in cn-north-1 end in .amazonaws.com.cn"},
		"China's suffix elsewhere":      {host: account + ".dkr.ecr.us-east-1.amazonaws.com.cn", err: "hosts in us-east-1 end in .amazonaws.com"},
		"dual stack without its suffix": {host: account + ".dkr-ecr.us-west-2.amazonaws.com", err: "hosts in us-west-2 end in .on.aws"},
		"its suffix without dual stack": {host: account + ".dkr.ecr.us-west-2.on.aws", err: "hosts in us-west-2 end in .amazonaws.com"},
		"ISO, dual stack":               {host: account + ".dkr-ecr.us-iso-east-1.c2s.ic.gov", err: "no dual-stack hosts are known in the partition aws-iso"},
		"a region of no partition":      {host: account + ".dkr.ecr.mars-east-1.amazonaws.com", err: "nothing is known of a region mars-east-1"},
		"no region":                     {host: account + ".dkr.ecr.amazonaws.com", err: "it should look like"},
		"more than a host may have":     {host: strings.Repeat("a", 254), err: "no host name"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r, err := ParseRegistry(test.host)
			if test.err != "" {
				require.ErrorIs(t, err, ErrRegistry)
				require.ErrorContains(t, err, test.err)
				require.NotContains(t, err.Error(), "hunter2")
				require.Zero(t, r)
				return
			}
			require.NoError(t, err)
			require.Equal(t, test.host, r.Host)
			require.Equal(t, test.scope, r.Scope)
			if test.public {
				require.Empty(t, r.Account)
				require.Equal(t, "public.ecr.aws", r.String())
			} else {
				require.Equal(t, account, r.Account)
				require.Equal(t, r.Region, r.String())
			}
		})
	}
}

func TestRegistryOf(t *testing.T) {
	t.Parallel()
	tests := map[string]struct{ account, region, host, err string }{
		"the usual partition":       {"123456789012", "eu-central-1", "123456789012.dkr.ecr.eu-central-1.amazonaws.com", ""},
		"China":                     {"012345678901", "cn-north-1", "012345678901.dkr.ecr.cn-north-1.amazonaws.com.cn", ""},
		"an account that lost zero": {"12345678901", "eu-central-1", "", "leading zeros are lost"},
		"no account":                {"", "eu-central-1", "", "12 digits"},
		"no region":                 {"123456789012", "", "", "nothing is known of the region"},
		"a bad region":              {"123456789012", "eu central", "", "nothing is known of the region"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r, err := RegistryOf(test.account, test.region)
			if test.err != "" {
				require.ErrorIs(t, err, ErrRegistry)
				require.ErrorContains(t, err, test.err)
				return
			}
			require.NoError(t, err)
			require.Equal(t, test.host, r.Host)
			require.Equal(t, test.account, r.Account)
		})
	}
}

func FuzzParseRegistry(f *testing.F) {
	for _, seed := range []string{
		"", "public.ecr.aws", "ecr-public.aws.com", "123456789012.dkr.ecr.eu-central-1.amazonaws.com", "123456789012.dkr-ecr-fips.us-gov-west-1.on.aws",
		"123456789012.dkr.ecr.cn-north-1.amazonaws.com.cn", "123456789012.dkr.ecr.us-iso-east-1.c2s.ic.gov", "u:p@123456789012.dkr.ecr.eu-central-1.amazonaws.com:1/x",
		"123456789012.dkr.ecr.eu-central-1.amazonaws.com.evil.io", "123456789012.dkr.ecr.EU-central-1.amazonaws.com.", "\xff\x00",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, host string) {
		r, err := ParseRegistry(host)
		if err != nil {
			require.ErrorIs(t, err, ErrRegistry)
			require.LessOrEqual(t, len(err.Error()), 500)
			require.True(t, utf8.ValidString(err.Error()))
			require.NotContains(t, err.Error(), "\n")
			return
		}
		require.Equal(t, host, r.Host)
		require.Regexp(t, `^[a-z0-9.-]+$`, host)
		if r.Public {
			return
		}
		owned := false // by AWS
		for _, p := range partitions {
			owned = owned || p.name == r.Partition && (strings.HasSuffix(host, "."+p.suffix) || p.dualStack != "" && strings.HasSuffix(host, "."+p.dualStack))
		}
		require.True(t, owned)
		require.True(t, strings.HasPrefix(host, r.Account+".dkr"))
		require.Contains(t, host, "."+r.Region+".")
		again, err := RegistryOf(r.Account, r.Region)
		require.NoError(t, err)
		require.Equal(t, r.Scope, again.Scope)
	})
}
