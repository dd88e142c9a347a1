package ecr

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"sync"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/aws/middleware"
	"github.com/aws/aws-sdk-go-v2/aws/retry"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/credentials/stscreds"
	"github.com/aws/aws-sdk-go-v2/service/ecr"
	"github.com/aws/aws-sdk-go-v2/service/ecrpublic"
	"github.com/aws/aws-sdk-go-v2/service/sts"
	"github.com/aws/smithy-go"
	"github.com/aws/smithy-go/logging"
	smithyhttp "github.com/aws/smithy-go/transport/http"

	"github.com/imps-node/imps/pkg/dockerconfig"
)

const (
	// maxTokenBytes bounds a token. AWS does not say how large one may be; they have 2 to 3 KiB.
	maxTokenBytes = 64 << 10
	// maxBodyBytes bounds what is read of an answer.
	maxBodyBytes = 256 << 10
)

// ErrNoCredentials says that the process has no AWS credentials of its own. It is ErrWait, too.
var ErrNoCredentials = fmt.Errorf("there are no AWS credentials for the coordinator itself (IRSA, Pod Identity, environment, profile or instance profile): %w", ErrWait)

// AWSOptions of AWS.
type AWSOptions struct {
	// SessionName is the name under which roles are assumed; CloudTrail shows it. Letters, digits and _+=,.@-, 2 to 64.
	SessionName string
	// Transport changes how connections are made; nil is the SDK's way, with its settings for proxies and CAs.
	Transport func(*http.Transport)
}

// AWS asks Amazon for tokens, with the SDK and all its settings: AWS_ENDPOINT_URL_ECR and the like, FIPS and dual-stack
// switches, AWS_CA_BUNDLE, HTTPS_PROXY (https://docs.aws.amazon.com/sdkref/latest/guide/settings-reference.html).
// It is safe for concurrent use.
type AWS struct {
	options AWSOptions

	mu      sync.Mutex
	ambient *aws.Config
	clients map[string]*client
}

// client is what one grant is asked with. It keeps credentials and the difference of the clocks.
type client struct {
	private *ecr.Client
	public  *ecrpublic.Client
}

// NewAWS returns a Minter that asks Amazon.
func NewAWS(options AWSOptions) *AWS {
	return &AWS{options: options, clients: map[string]*client{}}
}

// Mint asks for a token. Its errors are fit for everybody's eyes.
func (a *AWS) Mint(ctx context.Context, grant Grant) (Reply, error) {
	c, err := a.client(ctx, grant)
	if err != nil {
		return Reply{}, err
	}
	var reply Reply
	var encoded *string
	if grant.Public {
		var output *ecrpublic.GetAuthorizationTokenOutput
		if output, err = c.public.GetAuthorizationToken(ctx, &ecrpublic.GetAuthorizationTokenInput{}); err == nil {
			reply.Date, _ = middleware.GetServerTime(output.ResultMetadata)
			if data := output.AuthorizationData; data != nil {
				encoded, reply.Expires = data.AuthorizationToken, aws.ToTime(data.ExpiresAt)
			}
		}
	} else {
		var output *ecr.GetAuthorizationTokenOutput
		if output, err = c.private.GetAuthorizationToken(ctx, &ecr.GetAuthorizationTokenInput{}); err == nil {
			reply.Date, _ = middleware.GetServerTime(output.ResultMetadata)
			if len(output.AuthorizationData) > 0 {
				data := output.AuthorizationData[0]
				encoded, reply.Expires = data.AuthorizationToken, aws.ToTime(data.ExpiresAt)
			}
		}
	}
	if err != nil {
		return a.failed(ctx, grant, err)
	}
	reply.Password, err = decode(aws.ToString(encoded))
	return reply, err
}

// decode returns the password of a token.
func decode(encoded string) (dockerconfig.Sensitive, error) {
	if encoded == "" {
		return dockerconfig.Sensitive{}, errors.New("AWS has answered without a token")
	}
	if len(encoded) > maxTokenBytes {
		return dockerconfig.Sensitive{}, fmt.Errorf("AWS has answered with a token of %d bytes, and at most %d are believed", len(encoded), maxTokenBytes)
	}
	raw, err := base64.StdEncoding.DecodeString(encoded)
	if err != nil {
		return dockerconfig.Sensitive{}, errors.New("AWS has answered with a token that is not base64")
	}
	user, password, ok := strings.Cut(string(raw), ":")
	if !ok || user != Username || password == "" || strings.ContainsFunc(password, func(r rune) bool { return r < ' ' || r == 0x7f }) {
		return dockerconfig.Sensitive{}, fmt.Errorf("AWS has answered with a token that is not %q, a colon and a password", Username)
	}
	return dockerconfig.NewSensitive(password), nil
}

// failed returns what an error of the SDK comes to. A Date header counts where AWS itself has answered.
func (a *AWS) failed(ctx context.Context, grant Grant, err error) (Reply, error) {
	var reply Reply
	var answer *awshttp.ResponseError
	var refusal smithy.APIError
	refused := errors.As(err, &refusal)
	if refused && errors.As(err, &answer) && answer.Response != nil {
		reply.Date, _ = http.ParseTime(answer.Response.Header.Get("Date"))
	}
	code := ""
	if refused {
		code = refusal.ErrorCode()
	}
	if operation := innermost(err); grant.Public && strings.HasPrefix(code, "AccessDenied") && operation != nil && operation.OperationName == "GetAuthorizationToken" {
		return reply, nil // anonymous pulls work
	}
	explained := explain(ctx, err)
	expired := strings.HasPrefix(code, "ExpiredToken")
	if expired && !grant.Ambient() {
		explained = fmt.Errorf("%w: %w", explained, ErrWait)
	}
	if expired || errors.Is(explained, ErrWait) {
		a.Forget(grant)
		if grant.Ambient() {
			a.readAnew()
		}
	}
	return reply, explained
}

// Caller asks who asks for a grant, before any role is assumed.
func (a *AWS) Caller(ctx context.Context, grant Grant) (Caller, error) {
	base, err := a.base(ctx, grant)
	if err != nil {
		return Caller{}, err
	}
	output, err := sts.NewFromConfig(base).GetCallerIdentity(ctx, &sts.GetCallerIdentityInput{})
	if err != nil {
		reply, explained := a.failed(ctx, grant, err)
		return Caller{Date: reply.Date}, explained
	}
	date, _ := middleware.GetServerTime(output.ResultMetadata)
	return Caller{Principal: withoutSession(aws.ToString(output.Arn)), Date: date}, nil
}

var assumedRole = regexp.MustCompile(`^(arn:[^:]*:sts::[0-9]*:assumed-role/[^/]*)/.*$`)

// withoutSession takes the session's name off the ARN of an assumed role: each process has another.
func withoutSession(arn string) string { return assumedRole.ReplaceAllString(arn, "$1") }

// client returns what a grant is asked with, made on first use.
func (a *AWS) client(ctx context.Context, grant Grant) (*client, error) {
	id := grant.ID()
	a.mu.Lock()
	c := a.clients[id]
	a.mu.Unlock()
	if c != nil {
		return c, nil
	}
	base, err := a.base(ctx, grant)
	if err != nil {
		return nil, err
	}
	if grant.RoleARN != "" {
		base.Credentials = aws.NewCredentialsCache(stscreds.NewAssumeRoleProvider(sts.NewFromConfig(base), grant.RoleARN, func(o *stscreds.AssumeRoleOptions) {
			o.RoleSessionName = a.options.SessionName
			if !grant.ExternalID.IsZero() {
				o.ExternalID = aws.String(grant.ExternalID.Reveal())
			}
		}))
	}
	c = &client{}
	if grant.Public {
		c.public = ecrpublic.NewFromConfig(base)
	} else {
		c.private = ecr.NewFromConfig(base)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.clients[id] = c
	return c, nil
}

// Forget drops what is kept for a grant that nobody uses any more.
func (a *AWS) Forget(grant Grant) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.clients, grant.ID())
}

// readAnew has the credentials of the process itself read anew.
func (a *AWS) readAnew() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.ambient = nil
}

// base returns the configuration of a grant, before any role is assumed.
func (a *AWS) base(ctx context.Context, grant Grant) (aws.Config, error) {
	if grant.Ambient() {
		return a.ambientConfig(ctx, grant.Region)
	}
	return a.load(ctx, grant.Region, config.WithCredentialsProvider(credentials.NewStaticCredentialsProvider(
		grant.AccessKeyID.Reveal(), grant.SecretAccessKey.Reveal(), grant.SessionToken.Reveal(),
	)))
}

// ambientConfig returns the configuration of the process itself, whose credentials all regions share.
func (a *AWS) ambientConfig(ctx context.Context, region string) (aws.Config, error) {
	a.mu.Lock()
	ambient := a.ambient
	a.mu.Unlock()
	if ambient == nil {
		loaded, err := a.load(ctx, region)
		if err != nil {
			return aws.Config{}, err
		}
		ambient = &loaded
		a.mu.Lock()
		a.ambient = ambient
		a.mu.Unlock()
	}
	base := ambient.Copy()
	base.Region = region
	return base, nil
}

// load reads the SDK's settings. It makes no call.
func (a *AWS) load(ctx context.Context, region string, more ...func(*config.LoadOptions) error) (aws.Config, error) {
	connections := awshttp.NewBuildableClient().WithDialerOptions(func(d *net.Dialer) { d.Timeout = callTimeout })
	if a.options.Transport != nil {
		connections = connections.WithTransportOptions(a.options.Transport)
	}
	loaded, err := config.LoadDefaultConfig(ctx, append([]func(*config.LoadOptions) error{
		config.WithRegion(region),
		config.WithHTTPClient(connections),
		config.WithLogger(logging.Nop{}), // what is worth telling is in the errors
		// One call is one request; only where the clocks differ is there a second one. Tokens tries again.
		config.WithRetryer(func() aws.Retryer {
			return retry.NewStandard(func(o *retry.StandardOptions) {
				o.MaxAttempts = 2
				o.Retryables = []retry.IsErrorRetryable{retry.RetryableError{}}
			})
		}),
	}, more...)...)
	if err != nil {
		// What is wrong with a file, its parser may quote.
		return aws.Config{}, fmt.Errorf("the settings of the AWS SDK in environment and files cannot be read (AWS_PROFILE, AWS_CONFIG_FILE, AWS_CA_BUNDLE and the like): %w", ErrWait)
	}
	loaded.HTTPClient = bounded{loaded.HTTPClient}
	loaded.Credentials = tagged{loaded.Credentials}
	return loaded, nil
}

// bounded reads no more of an answer than it may have, and follows no redirect.
type bounded struct{ aws.HTTPClient }

var (
	errRedirect = errors.New("the answer is a redirect, which is not followed")
	errBroken   = errors.New("the answer ends in the middle")
	errTooLong  = fmt.Errorf("the answer is longer than %d bytes", maxBodyBytes)
)

func (b bounded) Do(request *http.Request) (*http.Response, error) {
	// The SDK closes the body once there is an answer, which may be before net/http has seen its end: then that would
	// close the connection with the answer in it.
	body, err := io.ReadAll(request.Body)
	if err != nil {
		return nil, fmt.Errorf("read the request: %w", err)
	}
	request = request.WithContext(request.Context())
	request.Body = io.NopCloser(bytes.NewReader(body))
	response, err := b.HTTPClient.Do(request)
	if err != nil {
		return nil, err
	}
	if response.StatusCode >= 300 && response.StatusCode < 400 {
		_ = response.Body.Close()
		return nil, errRedirect
	}
	response.Body = &boundedBody{response.Body, maxBodyBytes}
	return response, nil
}

type boundedBody struct {
	io.ReadCloser
	left int
}

func (b *boundedBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p[:min(len(p), b.left+1)])
	if b.left -= n; b.left < 0 {
		return 0, errTooLong
	}
	if err != nil && err != io.EOF {
		return n, errBroken
	}
	return n, err
}

// tagged tells errors of getting credentials from those of using them.
type tagged struct{ aws.CredentialsProvider }

type credentialsError struct{ error }

func (e credentialsError) Unwrap() error { return e.error }

func (t tagged) Retrieve(ctx context.Context) (aws.Credentials, error) {
	c, err := t.CredentialsProvider.Retrieve(ctx)
	if err != nil {
		return c, credentialsError{err}
	}
	return c, nil
}

var _ Minter = (*AWS)(nil)

// refusals are what AWS's codes mean for whoever reads the error, by what the codes begin with: services differ in what
// they end in.
var refusals = []struct {
	codes   []string
	meaning string
	wait    bool
}{
	{[]string{"AccessDenied", "NotAuthorized", "OptInRequired"}, "AWS does not allow it", true},
	{[]string{"UnrecognizedClient", "InvalidClientTokenId", "InvalidAccessKeyId", "AuthFailure", "IncompleteSignature", "MissingAuthenticationToken", "InvalidIdentityToken"}, "AWS does not know the credentials", true},
	{[]string{"SignatureDoesNotMatch", "InvalidSignature"}, "the secret key is wrong", true},
	{[]string{"ExpiredToken"}, "the session credentials have expired", false},
	{[]string{"RequestExpired", "RequestTimeTooSkewed", "RequestInTheFuture"}, "the clock is off", false},
	{[]string{"Throttl", "TooManyRequests", "RequestLimitExceeded", "LimitExceeded", "SlowDown", "PriorRequestNotComplete"}, "AWS throttles", false},
	{[]string{"UnsupportedCommand", "InvalidParameter", "ValidationError", "RegionDisabled", "PackedPolicyTooLarge", "MalformedPolicy"}, "AWS does not take the request", true},
}

// explain returns an error that says what is in the way and what to do, and no more: AWS's own texts may quote what was
// sent, as that of a bad signature does with its headers.
func explain(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return fmt.Errorf("no answer in time: %w", ctx.Err())
	}
	during := ""
	operation := innermost(err)
	if operation != nil {
		during = operation.OperationName + ": "
	}
	if refusal, ok := errors.AsType[smithy.APIError](err); ok {
		return refused(during, err, refusal)
	}
	if _, ok := errors.AsType[credentialsError](err); ok {
		var answer *smithyhttp.ResponseError
		passes := errors.As(err, &answer) && (answer.HTTPStatusCode() >= 500 || answer.HTTPStatusCode() == http.StatusTooManyRequests)
		if operation != nil && operation.ServiceID == "ec2imds" && !passes {
			return ErrNoCredentials // the last that the SDK looks for
		}
		during = "the coordinator's own AWS credentials: "
	}
	return errors.New(during + transport(err))
}

// innermost returns the operation that failed, of several the innermost: the role's, not the token's.
func innermost(err error) *smithy.OperationError {
	var operation *smithy.OperationError
	for next := (*smithy.OperationError)(nil); errors.As(err, &next); err = next.Err {
		operation = next
	}
	return operation
}

// told are messages that may be told: AWS names the principal, the action and the resource.
var told = regexp.MustCompile(`^User: arn:[\w:/.@=,+-]+ is not authorized to perform: [\w:-]+ on resource: [\w:/.*@=,+-]+`)

func refused(during string, err error, refusal smithy.APIError) error {
	code := refusal.ErrorCode()
	if len(code) > 100 || !codeOnly.MatchString(code) {
		code = "an error without a code"
	}
	for _, known := range refusals {
		if !slices.ContainsFunc(known.codes, func(prefix string) bool { return strings.HasPrefix(code, prefix) }) {
			continue
		}
		text := fmt.Sprintf("%s%s (%s)", during, known.meaning, code)
		if why := told.FindString(refusal.ErrorMessage()); why != "" && len(why) <= 700 {
			text += ": " + why
		}
		if known.wait {
			return fmt.Errorf("%s: %w", text, ErrWait)
		}
		return errors.New(text)
	}
	if answer, ok := errors.AsType[*awshttp.ResponseError](err); ok {
		return fmt.Errorf("%sAWS answers with HTTP status %d (%s)", during, answer.HTTPStatusCode(), code)
	}
	return fmt.Errorf("%sAWS fails (%s)", during, code)
}

var codeOnly = regexp.MustCompile(`^[A-Za-z][A-Za-z0-9.]*$`)

// transport says what is wrong with a connection or with what came over it.
func transport(err error) string {
	var (
		dns          *net.DNSError
		connection   *net.OpError
		verification interface{ Error() string }
		answer       *awshttp.ResponseError
		unreadable   *smithy.DeserializationError
	)
	switch {
	case errors.Is(err, errRedirect):
		return errRedirect.Error()
	case errors.Is(err, errTooLong):
		return errTooLong.Error()
	case errors.Is(err, errBroken):
		return errBroken.Error()
	case errors.As(err, &dns):
		return "the name " + quoted(dns.Name) + " cannot be resolved"
	case tlsError(err, &verification):
		return "the connection is not trusted: " + verification.Error() + "; AWS_CA_BUNDLE names a file with more certificate authorities"
	case errors.As(err, &connection):
		if connection.Op == "proxyconnect" {
			return "the proxy of HTTPS_PROXY does not connect"
		}
		return "no connection: " + connection.Op + " " + connection.Net + ": " + reason(connection)
	case errors.As(err, &answer) && answer.HTTPStatusCode() != 0:
		return fmt.Sprintf("the answer, with HTTP status %d, is not one of AWS; is there a proxy or a captive portal in between", answer.HTTPStatusCode())
	case errors.As(err, &unreadable):
		return "the answer is not one of AWS; is there a proxy or a captive portal in between"
	default:
		return "the connection has ended without an answer"
	}
}

func reason(err error) string {
	for {
		inner := errors.Unwrap(err)
		if inner == nil {
			return err.Error()
		}
		err = inner
	}
}

// tlsError finds what is wrong with a certificate. These errors tell names and times of certificates only.
func tlsError(err error, found *interface{ Error() string }) bool {
	var (
		verification *tls.CertificateVerificationError
		alert        tls.AlertError
	)
	switch {
	case errors.As(err, &verification):
		*found = verification.Err
	case errors.Is(err, http.ErrSchemeMismatch):
		*found = errors.New("the other side does not speak TLS")
	case errors.As(err, &alert):
		*found = alert
	default:
		return false
	}
	return true
}
