package ecr

import (
	"context"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/aws/smithy-go"
	smithyhttp "github.com/aws/smithy-go/transport/http"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/imps-node/imps/pkg/dockerconfig"
	"github.com/imps-node/imps/test/fakeaws"
)

// Principals of the tests, and what they sign with.
const (
	coordinator = "arn:aws:iam::111111111111:user/coordinator"
	customer    = "arn:aws:iam::222222222222:user/customer"
	pullRole    = "arn:aws:iam::333333333333:role/pull"
	otherRole   = "arn:aws:iam::444444444444:role/pull"
)

func TestMain(m *testing.M) {
	// Nothing of the machine's own settings counts.
	for key := range strings.FieldsFuncSeq(strings.Join(os.Environ(), "\n"), func(r rune) bool { return r == '\n' }) {
		if name, _, _ := strings.Cut(key, "="); strings.HasPrefix(name, "AWS_") || strings.HasSuffix(strings.ToUpper(name), "_PROXY") {
			_ = os.Unsetenv(name)
		}
	}
	for name, value := range map[string]string{
		"AWS_ENDPOINT_URL_ECR": "http://aws.test", "AWS_ENDPOINT_URL_ECR_PUBLIC": "http://aws.test", "AWS_ENDPOINT_URL_STS": "http://aws.test",
		"AWS_CONFIG_FILE": os.DevNull, "AWS_SHARED_CREDENTIALS_FILE": os.DevNull, "AWS_EC2_METADATA_DISABLED": "true",
		"AWS_ACCESS_KEY_ID": "AKIACOORDINATOR", "AWS_SECRET_ACCESS_KEY": canary + "-coordinator",
	} {
		_ = os.Setenv(name, value)
	}
	goleak.VerifyTestMain(m)
}

// customerKeys are those of customer.
func customerKeys() Identity {
	return Identity{AccessKeyID: dockerconfig.NewSensitive("AKIACUSTOMER"), SecretAccessKey: dockerconfig.NewSensitive(canary + "-customer")}
}

// pipes is a network in memory.
type pipes struct {
	connections chan net.Conn
	closed      chan struct{}
	dialed      atomic.Int64
}

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case c := <-p.connections:
		return c, nil
	case <-p.closed:
		return nil, net.ErrClosed
	}
}

func (p *pipes) Close() error {
	close(p.closed)
	return nil
}
func (*pipes) Addr() net.Addr { return &net.IPAddr{} }

func (p *pipes) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	p.dialed.Add(1)
	ours, theirs := net.Pipe()
	select {
	case p.connections <- theirs:
		return ours, nil
	case <-p.closed:
		return nil, errors.New("no route to host")
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// newAWS returns a Minter and the AWS that it asks.
func newAWS(t *testing.T) (*AWS, *fakeaws.Server) {
	t.Helper()
	fake := fakeaws.New()
	fake.AddKey(fakeaws.Key{AccessKeyID: "AKIACOORDINATOR", SecretAccessKey: canary + "-coordinator", Principal: coordinator})
	fake.AddKey(fakeaws.Key{AccessKeyID: "AKIACUSTOMER", SecretAccessKey: canary + "-customer", Principal: customer})
	fake.AddRole(fakeaws.Role{ARN: pullRole, Trusted: []string{coordinator, customer}, ExternalID: "external-" + canary})
	fake.AddRole(fakeaws.Role{ARN: otherRole})
	return newAWSAt(t, fake), fake
}

// newAWSAt returns a Minter that asks this server.
func newAWSAt(t *testing.T, handler http.Handler) *AWS {
	t.Helper()
	network := &pipes{connections: make(chan net.Conn), closed: make(chan struct{})}
	server := &http.Server{Handler: handler, ReadHeaderTimeout: time.Minute}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = server.Serve(network)
	}()
	var transports []*http.Transport
	t.Cleanup(func() {
		for _, transport := range transports {
			transport.CloseIdleConnections()
		}
		_ = server.Close()
		<-done
	})
	return NewAWS(AWSOptions{SessionName: "imps-test", Transport: func(transport *http.Transport) {
		transport.DialContext = network.dial
		transports = append(transports, transport)
	}})
}

// requireGood requires that a reply is a token that opens the registries of a region.
func requireGood(t *testing.T, fake *fakeaws.Server, grant Grant, reply Reply) {
	t.Helper()
	require.True(t, fake.Opens(grant.Region, grant.Public, Username, reply.Password.Reveal()))
	require.WithinDuration(t, time.Now().Add(12*time.Hour), reply.Expires, time.Minute)
	require.WithinDuration(t, time.Now(), reply.Date, time.Minute)
}

func TestEachIdentityGetsItsOwnTokens(t *testing.T) {
	t.Parallel()
	role := func(i Identity, arn, external string) Identity {
		i.RoleARN, i.ExternalID = arn, dockerconfig.NewSensitive(external)
		return i
	}
	session := customerKeys()
	session.SessionToken = dockerconfig.NewSensitive(canary + "-session")
	session.AccessKeyID = dockerconfig.NewSensitive("ASIASESSION")
	for name, test := range map[string]struct {
		identity  Identity
		principal string
	}{
		"access keys":                    {customerKeys(), customer},
		"access keys of a session":       {session, customer + "/session"},
		"a role":                         {role(customerKeys(), otherRole, ""), "arn:aws:sts::444444444444:assumed-role/pull/imps-test"},
		"a role with an external ID":     {role(customerKeys(), pullRole, "external-"+canary), "arn:aws:sts::333333333333:assumed-role/pull/imps-test"},
		"the process itself":             {Identity{}, coordinator},
		"a role of the process itself":   {role(Identity{}, otherRole, ""), "arn:aws:sts::444444444444:assumed-role/pull/imps-test"},
		"another one, by an external ID": {role(Identity{}, pullRole, "external-"+canary), "arn:aws:sts::333333333333:assumed-role/pull/imps-test"},
	} {
		for _, scope := range []Scope{frankfurt, beijing, {Partition: "aws-us-gov", Region: "us-gov-west-1"}, {Partition: "aws", Region: "us-east-1", Public: true}} {
			t.Run(name+", "+scope.String(), func(t *testing.T) {
				t.Parallel()
				minter, fake := newAWS(t)
				fake.AddKey(fakeaws.Key{AccessKeyID: "ASIASESSION", SecretAccessKey: canary + "-customer", SessionToken: canary + "-session", Principal: customer + "/session"})
				grant := Grant{scope, test.identity}
				reply, err := minter.Mint(t.Context(), grant)
				require.NoError(t, err)
				requireGood(t, fake, grant, reply)
				require.Equal(t, test.principal, fake.Grants()[0].Principal)
				require.Equal(t, scope.Region, fake.Grants()[0].Region)
				require.Empty(t, fake.Refused())
				first := len(fake.Calls())
				if test.identity.RoleARN == "" {
					require.Equal(t, 1, first)
				} else {
					require.Equal(t, 2, first)
				}
				reply, err = minter.Mint(t.Context(), grant)
				require.NoError(t, err)
				requireGood(t, fake, grant, reply)
				require.Len(t, fake.Calls(), 1, "the role is not assumed again")
			})
		}
	}
}

// Where two roles are behind one key pair, each has its own token.
func TestRolesBehindOneKeyPairAreNotMixedUp(t *testing.T) {
	t.Parallel()
	minter, fake := newAWS(t)
	fake.AddRole(fakeaws.Role{ARN: pullRole})
	for _, role := range []string{pullRole, otherRole, pullRole} {
		grant := Grant{frankfurt, customerKeys()}
		grant.RoleARN = role
		reply, err := minter.Mint(t.Context(), grant)
		require.NoError(t, err)
		for _, g := range fake.Grants() {
			if g.Password == reply.Password.Reveal() {
				require.Equal(t, strings.Split(role, ":")[4], strings.Split(g.Principal, ":")[4])
			}
		}
	}
	require.Len(t, fake.Grants(), 3)
}

func TestWhatAWSAnswersOnABadDay(t *testing.T) {
	t.Parallel()
	fails := func(f fakeaws.Fault) func(*fakeaws.Server) {
		return func(s *fakeaws.Server) { s.Faults(func(fakeaws.Call) *fakeaws.Fault { return &f }) }
	}
	lies := func(change func(*fakeaws.Answer)) func(*fakeaws.Server) {
		return func(s *fakeaws.Server) { s.Answers(func(_ fakeaws.Call, a *fakeaws.Answer) { change(a) }) }
	}
	encoded := func(text string) func(*fakeaws.Answer) {
		return func(a *fakeaws.Answer) { a.Token = base64.StdEncoding.EncodeToString([]byte(text)) }
	}
	for name, test := range map[string]struct {
		edit func(*fakeaws.Server)
		role string
		err  string
		wait bool
	}{
		"throttled":                      {fails(fakeaws.Fault{Code: "ThrottlingException", Message: canary}), "", "GetAuthorizationToken: AWS throttles (ThrottlingException)", false},
		"throttled, as HTTP says it":     {fails(fakeaws.Fault{Code: "TooManyRequestsException", Status: 429}), "", "AWS throttles (TooManyRequestsException)", false},
		"it fails":                       {fails(fakeaws.Fault{Code: "ServerException", Status: 500, Message: canary}), "", "GetAuthorizationToken: AWS answers with HTTP status 500 (ServerException)", false},
		"not allowed":                    {func(s *fakeaws.Server) { s.Deny(customer, true) }, "", "AWS does not allow it (AccessDeniedException): User: " + customer + " is not authorized to perform: ecr:GetAuthorizationToken on resource: *", true},
		"not allowed, with a long story": {fails(fakeaws.Fault{Code: "AccessDeniedException", Message: canary}), "", "AWS does not allow it (AccessDeniedException)", true},
		"the key is not known":           {func(s *fakeaws.Server) { s.RemoveKey("AKIACUSTOMER") }, "", "AWS does not know the credentials (UnrecognizedClientException)", true},
		"the secret is wrong":            {func(s *fakeaws.Server) { s.AddKey(fakeaws.Key{AccessKeyID: "AKIACUSTOMER", SecretAccessKey: "x"}) }, "", "the secret key is wrong (InvalidSignatureException)", true},
		"the session has expired": {func(s *fakeaws.Server) {
			s.AddKey(fakeaws.Key{AccessKeyID: "AKIACUSTOMER", SecretAccessKey: canary + "-customer", Expires: time.Now().Add(-time.Hour)})
		}, "", "the session credentials have expired (ExpiredTokenException)", true},
		"the role does not trust it":       {func(s *fakeaws.Server) { s.AddRole(fakeaws.Role{ARN: otherRole, Trusted: []string{coordinator}}) }, otherRole, "AssumeRole: AWS does not allow it (AccessDenied): User: " + customer + " is not authorized to perform: sts:AssumeRole on resource: " + otherRole, true},
		"the role wants an external ID":    {func(*fakeaws.Server) {}, pullRole, "AssumeRole: AWS does not allow it (AccessDenied)", true},
		"a request that it does not take":  {fails(fakeaws.Fault{Code: "InvalidParameterException"}), "", "AWS does not take the request (InvalidParameterException)", true},
		"an error that nobody knows":       {fails(fakeaws.Fault{Code: "Teapot", Status: 418}), "", "AWS answers with HTTP status 418 (Teapot)", false},
		"an error with a code that is odd": {fails(fakeaws.Fault{Code: canary + "\n", Status: 418}), "", "HTTP status 418", false},
		"an HTML page":                     {fails(fakeaws.Fault{Body: "<html>" + canary, ContentType: "text/html"}), "", "the answer, with HTTP status 200, is not one of AWS", false},
		"an HTML page as an error":         {fails(fakeaws.Fault{Body: "<html>" + canary, ContentType: "text/html", Status: 503}), "", "503", false},
		"a redirect":                       {fails(fakeaws.Fault{Location: "http://elsewhere.test/" + canary}), "", "the answer is a redirect", false},
		"half an answer":                   {fails(fakeaws.Fault{Truncate: true}), "", "the answer ends in the middle", false},
		"no token":                         {lies(func(a *fakeaws.Answer) { a.Empty = true }), "", "without a token", false},
		"an empty token":                   {lies(func(a *fakeaws.Answer) { a.Token = "" }), "", "without a token", false},
		"a token that is not base64":       {lies(func(a *fakeaws.Answer) { a.Token = canary + "!" }), "", "not base64", false},
		"a token without a colon":          {lies(encoded(canary)), "", `not "AWS", a colon and a password`, false},
		"a token without a password":       {lies(encoded("AWS:")), "", `not "AWS", a colon and a password`, false},
		"a token of another user":          {lies(encoded("root:" + canary)), "", `not "AWS", a colon and a password`, false},
		"a token with a line break":        {lies(encoded("AWS:a\n" + canary)), "", `not "AWS", a colon and a password`, false},
		"a token of 100 KiB":               {lies(encoded("AWS:" + strings.Repeat("x", 100<<10))), "", "at most 65536 are believed", false},
		"a token of 1 MiB":                 {lies(encoded("AWS:" + strings.Repeat("x", 1<<20))), "", "the answer is longer than 262144 bytes", false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			minter, fake := newAWS(t)
			test.edit(fake)
			grant := Grant{frankfurt, customerKeys()}
			grant.RoleARN = test.role
			reply, err := minter.Mint(t.Context(), grant)
			require.ErrorContains(t, err, test.err)
			require.True(t, reply.Password.IsZero())
			require.Equal(t, test.wait, errors.Is(err, ErrWait), err)
			require.NotContains(t, fmt.Sprintf("%v %+v %#v", err, err, err), canary)
			require.LessOrEqual(t, len(err.Error()), 1000)
			fake.Faults(nil)
			fake.Answers(nil)
			if test.role == "" && !test.wait {
				reply, err = minter.Mint(t.Context(), grant)
				require.NoError(t, err)
				requireGood(t, fake, grant, reply)
			}
		})
	}
}

// Nothing is served to whom ECR Public gives nothing: anonymous pulls work.
func TestECRPublicWithoutPermissionIsNoFailure(t *testing.T) {
	t.Parallel()
	minter, fake := newAWS(t)
	fake.Deny(customer, true)
	grant := Grant{Scope{Partition: "aws", Region: "us-east-1", Public: true}, customerKeys()}
	reply, err := minter.Mint(t.Context(), grant)
	require.NoError(t, err)
	require.True(t, reply.Password.IsZero())
	require.False(t, reply.Date.IsZero())
	fake.Faults(func(fakeaws.Call) *fakeaws.Fault { return &fakeaws.Fault{Code: "ThrottlingException"} })
	_, err = minter.Mint(t.Context(), grant)
	require.ErrorContains(t, err, "throttles")
}

// A role that cannot be assumed is one, though.
func TestECRPublicWithARoleThatCannotBeAssumed(t *testing.T) {
	t.Parallel()
	minter, fake := newAWS(t)
	fake.AddRole(fakeaws.Role{ARN: otherRole, Trusted: []string{customer}})
	grant := Grant{Scope{Partition: "aws", Region: "us-east-1", Public: true}, Identity{RoleARN: otherRole}}
	_, err := minter.Mint(t.Context(), grant)
	require.ErrorContains(t, err, "AssumeRole: AWS does not allow it (AccessDenied)")
}

func TestConnectionsThatFail(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		transport func(*http.Transport)
		err       string
	}{
		"no such host": {func(tr *http.Transport) {
			tr.DialContext = func(context.Context, string, string) (net.Conn, error) {
				return nil, &net.OpError{Op: "dial", Net: "tcp", Err: &net.DNSError{Err: "no such host", Name: "aws.test", IsNotFound: true}}
			}
		}, "the name aws.test cannot be resolved"},
		"refused": {func(tr *http.Transport) {
			tr.DialContext = func(context.Context, string, string) (net.Conn, error) {
				return nil, &net.OpError{Op: "dial", Net: "tcp", Err: errors.New("connection refused")}
			}
		}, "no connection: dial tcp: connection refused"},
		"a proxy that refuses": {func(tr *http.Transport) {
			tr.Proxy = http.ProxyURL(&url.URL{Scheme: "http", Host: "127.0.0.1:1", User: url.UserPassword("u", canary)})
		}, "the proxy of HTTPS_PROXY does not connect"},
		"closed at once": {func(tr *http.Transport) {
			tr.DialContext = func(context.Context, string, string) (net.Conn, error) {
				ours, theirs := net.Pipe()
				_ = theirs.Close()
				return ours, nil
			}
		}, "the connection has ended without an answer"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			minter := NewAWS(AWSOptions{SessionName: "imps-test", Transport: test.transport})
			_, err := minter.Mint(t.Context(), Grant{frankfurt, customerKeys()})
			require.ErrorContains(t, err, test.err)
			require.NotErrorIs(t, err, ErrWait)
			require.NotContains(t, err.Error(), canary)
		})
	}
}

// A certificate that nobody vouches for, until AWS_CA_BUNDLE does.
func TestCertificates(t *testing.T) {
	_, fake := newAWS(t)
	server := httptest.NewUnstartedServer(fake)
	server.Config.ErrorLog = log.New(io.Discard, "", 0)
	server.StartTLS()
	t.Cleanup(server.Close)
	t.Setenv("AWS_ENDPOINT_URL_ECR", server.URL)
	direct := AWSOptions{SessionName: "imps-test", Transport: func(tr *http.Transport) { tr.DisableKeepAlives = true }}
	grant := Grant{frankfurt, customerKeys()}
	_, err := NewAWS(direct).Mint(t.Context(), grant)
	require.ErrorContains(t, err, "the connection is not trusted: x509: certificate signed by unknown authority; AWS_CA_BUNDLE names")

	bundle := filepath.Join(t.TempDir(), "ca.pem")
	require.NoError(t, os.WriteFile(bundle, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw}), 0o600))
	t.Setenv("AWS_CA_BUNDLE", bundle)
	reply, err := NewAWS(direct).Mint(t.Context(), grant)
	require.NoError(t, err)
	requireGood(t, fake, grant, reply)

	plain := httptest.NewServer(fake)
	t.Cleanup(plain.Close)
	t.Setenv("AWS_ENDPOINT_URL_ECR", strings.Replace(plain.URL, "http:", "https:", 1))
	_, err = NewAWS(direct).Mint(t.Context(), grant)
	require.ErrorContains(t, err, "the other side does not speak TLS")
}

func TestACallEndsWithItsContext(t *testing.T) {
	t.Parallel()
	minter, fake := newAWS(t)
	asked := make(chan struct{})
	fake.Faults(func(fakeaws.Call) *fakeaws.Fault {
		close(asked)
		return &fakeaws.Fault{Hang: true}
	})
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		<-asked
		cancel()
	}()
	_, err := minter.Mint(ctx, Grant{frankfurt, customerKeys()})
	require.ErrorIs(t, err, context.Canceled)
}

// The clock of the machine is off by hours: AWS refuses the first signature, and no further one.
func TestSignaturesFollowTheClockOfAWS(t *testing.T) {
	t.Parallel()
	for _, off := range []time.Duration{12 * time.Hour, -12 * time.Hour} {
		t.Run(off.String(), func(t *testing.T) {
			t.Parallel()
			minter, fake := newAWS(t)
			fake.Clock = func() time.Time { return time.Now().Add(off) }
			for i := range 3 {
				reply, err := minter.Mint(t.Context(), Grant{frankfurt, customerKeys()})
				require.NoError(t, err)
				require.WithinDuration(t, time.Now().Add(off), reply.Date, time.Minute)
				require.Len(t, fake.Refused(), max(1-i, 0))
			}
		})
	}
}

func TestCaller(t *testing.T) {
	t.Parallel()
	minter, fake := newAWS(t)
	for principal, identities := range map[string][]Identity{coordinator: {{}, {RoleARN: pullRole}}, customer: {customerKeys()}} {
		for _, identity := range identities {
			caller, err := minter.Caller(t.Context(), Grant{frankfurt, identity})
			require.NoError(t, err)
			require.Equal(t, principal, caller.Principal)
			require.WithinDuration(t, time.Now(), caller.Date, time.Minute)
		}
	}
	fake.RemoveKey("AKIACOORDINATOR")
	_, err := minter.Caller(t.Context(), Grant{Scope: frankfurt})
	require.ErrorContains(t, err, "GetCallerIdentity: AWS does not know the credentials")
	require.Equal(t, "arn:aws:sts::1:assumed-role/r", withoutSession("arn:aws:sts::1:assumed-role/r/session"))
	require.Equal(t, "arn:aws:iam::1:user/a/b", withoutSession("arn:aws:iam::1:user/a/b"))
}

// The ambient identity is what the SDK finds: each of these in its own environment.
func TestTheAmbientIdentityIsWhatTheSDKFinds(t *testing.T) {
	file := func(t *testing.T, content string) string {
		path := filepath.Join(t.TempDir(), "file")
		require.NoError(t, os.WriteFile(path, []byte(content), 0o600))
		return path
	}
	for name, test := range map[string]struct {
		env       func(t *testing.T) map[string]string
		principal string
		err       error
	}{
		"a profile": {func(t *testing.T) map[string]string {
			return map[string]string{"AWS_SHARED_CREDENTIALS_FILE": file(t, "[default]\naws_access_key_id = AKIACUSTOMER\naws_secret_access_key = "+canary+"-customer\n")}
		}, customer, nil},
		"IRSA": {func(t *testing.T) map[string]string {
			return map[string]string{"AWS_WEB_IDENTITY_TOKEN_FILE": file(t, "jwt"), "AWS_ROLE_ARN": otherRole, "AWS_ROLE_SESSION_NAME": "irsa"}
		}, "arn:aws:sts::444444444444:assumed-role/pull/irsa", nil},
		"Pod Identity": {func(t *testing.T) map[string]string {
			agent := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if r.Header.Get("Authorization") != "pod-token" {
					w.WriteHeader(http.StatusUnauthorized)
				}
				_, _ = io.WriteString(w, `{"AccessKeyId":"ASIAPOD","SecretAccessKey":"s","Token":"t","Expiration":"2099-01-01T00:00:00Z"}`)
			}))
			t.Cleanup(agent.Close)
			return map[string]string{"AWS_CONTAINER_CREDENTIALS_FULL_URI": agent.URL, "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE": file(t, "pod-token")}
		}, customer + "/pod", nil},
		"Pod Identity whose agent is away": {func(t *testing.T) map[string]string {
			return map[string]string{"AWS_CONTAINER_CREDENTIALS_FULL_URI": "http://127.0.0.1:1", "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE": file(t, "pod-token")}
		}, "", errors.New("the coordinator's own AWS credentials: no connection: dial tcp: connection refused")},
		"none at all": {func(*testing.T) map[string]string { return nil }, "", ErrNoCredentials},
		"a file that cannot be read": {func(t *testing.T) map[string]string {
			return map[string]string{"AWS_CA_BUNDLE": file(t, canary)}
		}, "", ErrWait},
	} {
		t.Run(name, func(t *testing.T) {
			t.Setenv("AWS_ACCESS_KEY_ID", "")
			t.Setenv("AWS_SECRET_ACCESS_KEY", "")
			for key, value := range test.env(t) {
				t.Setenv(key, value)
			}
			minter, fake := newAWS(t)
			fake.AddKey(fakeaws.Key{AccessKeyID: "ASIAPOD", SecretAccessKey: "s", SessionToken: "t", Principal: customer + "/pod"})
			reply, err := minter.Mint(t.Context(), Grant{Scope: frankfurt})
			if test.err != nil {
				require.ErrorContains(t, err, test.err.Error())
				require.NotContains(t, err.Error(), canary)
				return
			}
			require.NoError(t, err)
			requireGood(t, fake, Grant{Scope: frankfurt}, reply)
			require.Equal(t, test.principal, fake.Grants()[0].Principal)
		})
	}
}

// Credentials of the process itself that have expired, or that AWS does not know any more, are read anew.
func TestCredentialsAreReadAnew(t *testing.T) {
	for name, test := range map[string]struct {
		expires time.Time // of the first; zero where AWS does not know them
		err     string
		wait    bool // else they may be renewed at any time
	}{
		"expired": {time.Now().Add(-time.Minute), "the session credentials have expired", false},
		"unknown": {time.Time{}, "AWS does not know the credentials", true},
	} {
		t.Run(name, func(t *testing.T) {
			credentials := filepath.Join(t.TempDir(), "credentials")
			write := func(id string) {
				require.NoError(t, os.WriteFile(credentials, []byte("[default]\naws_access_key_id = "+id+"\naws_secret_access_key = s\naws_session_token = t\n"), 0o600))
			}
			t.Setenv("AWS_ACCESS_KEY_ID", "")
			t.Setenv("AWS_SECRET_ACCESS_KEY", "")
			t.Setenv("AWS_SHARED_CREDENTIALS_FILE", credentials)
			minter, fake := newAWS(t)
			if !test.expires.IsZero() {
				fake.AddKey(fakeaws.Key{AccessKeyID: "ASIAONE", SecretAccessKey: "s", SessionToken: "t", Principal: "one", Expires: test.expires})
			}
			fake.AddKey(fakeaws.Key{AccessKeyID: "ASIATWO", SecretAccessKey: "s", SessionToken: "t", Principal: "two"})
			write("ASIAONE")
			_, err := minter.Mint(t.Context(), Grant{Scope: frankfurt})
			require.ErrorContains(t, err, test.err)
			require.Equal(t, test.wait, errors.Is(err, ErrWait))
			write("ASIATWO")
			reply, err := minter.Mint(t.Context(), Grant{Scope: frankfurt})
			require.NoError(t, err)
			requireGood(t, fake, Grant{Scope: frankfurt}, reply)
			caller, err := minter.Caller(t.Context(), Grant{Scope: frankfurt})
			require.NoError(t, err)
			require.Equal(t, "two", caller.Principal)
		})
	}
}

// The instance metadata service is the last where credentials may be. That it fails for a moment does not mean that there are
// none.
func TestAnInstanceMetadataServiceThatFails(t *testing.T) {
	t.Parallel()
	for status, none := range map[int]bool{http.StatusNotFound: true, http.StatusForbidden: true, http.StatusTooManyRequests: false, http.StatusInternalServerError: false, http.StatusServiceUnavailable: false} {
		response := &smithyhttp.ResponseError{Response: &smithyhttp.Response{Response: &http.Response{StatusCode: status}}}
		err := credentialsError{&smithy.OperationError{ServiceID: "ec2imds", OperationName: "GetMetadata", Err: response}}
		require.Equal(t, none, errors.Is(explain(t.Context(), err), ErrNoCredentials), status)
	}
}
