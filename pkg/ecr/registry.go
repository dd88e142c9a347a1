// Package ecr turns AWS identities into tokens for Amazon ECR registries: it knows the hosts of registries, who may
// ask for a token, how to ask, and when to ask again. It is the only user of the AWS SDK.
//
// A token opens every registry of a region that its principal may read, in any account, so there is one for each
// principal and region, not for each registry (https://docs.aws.amazon.com/AmazonECR/latest/APIReference/API_GetAuthorizationToken.html).
package ecr

import (
	"errors"
	"fmt"
	"regexp"
	"strings"
)

// ErrRegistry says that a host is not that of an ECR registry.
var ErrRegistry = errors.New("not an ECR registry")

// Scope is where a token is valid.
type Scope struct {
	// Partition as AWS calls it: "aws", "aws-cn", "aws-us-gov" and so on.
	Partition string
	// Region that the registry is in. It is us-east-1 for ECR Public, which gives out tokens there only.
	Region string
	// Public: ECR Public, whose tokens are no others'.
	Public bool
}

// String returns the scope as people write it: the region, or "public.ecr.aws".
func (s Scope) String() string {
	if s.Public {
		return publicHosts[0]
	}
	return s.Region
}

// Registry is one ECR registry.
type Registry struct {
	// Host as images name it.
	Host string
	// Account has 12 digits; it is empty for ECR Public.
	Account string
	Scope
}

// publicHosts are those of ECR Public, the second for IPv6
// (https://docs.aws.amazon.com/AmazonECR/latest/public/public-ecr-requests.html).
var publicHosts = [...]string{"public.ecr.aws", "ecr-public.aws.com"}

// partition is a part of AWS with names and credentials of its own.
type partition struct {
	name string
	// prefix is what the names of its regions begin with.
	prefix string
	// suffix and dualStack are what the hosts of its registries end in; empty where no such host is known.
	suffix, dualStack string
}

// partitions are those of the SDK (aws-sdk-go-v2, internal/endpoints/awsrulesfn/partitions.json), with regions that
// do not exist yet. The dual-stack suffixes are those of kubernetes/cloud-provider-aws, cmd/ecr-credential-provider.
// The first match counts; the last one has all regions that begin with a country or a continent in two letters.
var partitions = []partition{
	{"aws-cn", "cn-", "amazonaws.com.cn", "on.amazonwebservices.com.cn"},
	{"aws-us-gov", "us-gov-", "amazonaws.com", "on.aws"},
	{"aws-eusc", "eusc-", "amazonaws.eu", ""},
	{"aws-iso", "us-iso-", "c2s.ic.gov", ""},
	{"aws-iso-b", "us-isob-", "sc2s.sgov.gov", ""},
	{"aws-iso-e", "eu-isoe-", "cloud.adc-e.uk", ""},
	{"aws-iso-f", "us-isof-", "csp.hci.ic.gov", ""},
	{"aws", "", "amazonaws.com", "on.aws"},
}

const (
	accountPattern = `[0-9]{12}`
	regionPattern  = `[a-z]{2,8}(?:-[a-z]{1,16}){1,3}-[0-9]{1,2}`
)

var (
	accountOnly = regexp.MustCompile(`^` + accountPattern + `$`)
	regionOnly  = regexp.MustCompile(`^` + regionPattern + `$`)
	privateHost = regexp.MustCompile(`^(` + accountPattern + `)\.dkr([.-])ecr(?:-fips)?\.(` + regionPattern + `)\.([a-z0-9.-]+)$`)
	// printable is what may be quoted: no user information, nothing that moves a cursor. Counts up to hundreds are not in
	// these expressions: they would be compiled to as many instructions.
	printable = regexp.MustCompile(`^[a-z0-9.-]+$`)
)

// ParseRegistry parses the host of a registry, as an image reference has it: no scheme, port, path or user
// information, in lower case. Every other host is an error, ErrRegistry, which says why and quotes no user information.
func ParseRegistry(host string) (Registry, error) {
	for _, public := range publicHosts {
		if host == public {
			return Registry{Host: host, Scope: Scope{Partition: "aws", Region: "us-east-1", Public: true}}, nil
		}
	}
	parts := privateHost.FindStringSubmatch(host)
	if parts == nil {
		return Registry{}, fmt.Errorf("%s: %w: it should look like 123456789012.dkr.ecr.eu-central-1.amazonaws.com or public.ecr.aws, without scheme, port and path", quoted(host), ErrRegistry)
	}
	account, dualStack, region, suffix := parts[1], parts[2] == "-", parts[3], parts[4]
	p := partitionOf(region)
	if p == nil {
		return Registry{}, fmt.Errorf("%s: %w: nothing is known of a region %s", host, ErrRegistry, region)
	}
	want := p.suffix
	if dualStack {
		want = p.dualStack
	}
	switch {
	case want == "":
		return Registry{}, fmt.Errorf("%s: %w: no dual-stack hosts are known in the partition %s", host, ErrRegistry, p.name)
	case suffix != want:
		return Registry{}, fmt.Errorf("%s: %w: hosts in %s end in .%s", host, ErrRegistry, region, want)
	}
	return Registry{Host: host, Account: account, Scope: Scope{Partition: p.name, Region: region}}, nil
}

// RegistryOf returns the registry of an account in a region, at its IPv4 host.
func RegistryOf(account, region string) (Registry, error) {
	if !accountOnly.MatchString(account) {
		return Registry{}, fmt.Errorf("%w: an account ID has 12 digits (quote it in YAML, or leading zeros are lost)", ErrRegistry)
	}
	p := partitionOf(region)
	if p == nil {
		return Registry{}, fmt.Errorf("%w: nothing is known of the region %s", ErrRegistry, quoted(region))
	}
	return ParseRegistry(strings.Join([]string{account, "dkr", "ecr", region, p.suffix}, "."))
}

// partitionOf returns the partition that a region is in, or nil.
func partitionOf(region string) *partition {
	if !regionOnly.MatchString(region) {
		return nil
	}
	for i := range partitions {
		if prefix := partitions[i].prefix; prefix != "" && strings.HasPrefix(region, prefix) || prefix == "" && strings.IndexByte(region, '-') == 2 {
			return &partitions[i]
		}
	}
	return nil
}

// quoted returns a text for an error, if it may be told.
func quoted(text string) string {
	if len(text) <= 253 && printable.MatchString(text) {
		return text
	}
	return "a name that is no host name in lower case"
}
