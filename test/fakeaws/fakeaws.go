// Package fakeaws is an Amazon ECR, ECR Public and STS for tests and the demo. It speaks their wire formats, verifies
// signatures (SigV4, with the SDK's own signer) against the keys that it knows, and remembers the tokens that it gives
// out, so that a registry can ask whether one is good. It can be told to do everything that AWS does on a bad day.
package fakeaws

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"
)

// Key is an access key.
type Key struct {
	AccessKeyID, SecretAccessKey string
	// SessionToken is that of temporary keys.
	SessionToken string
	// Principal is the ARN of whom the key belongs to.
	Principal string
	// Expires is zero for one that does not.
	Expires time.Time
}

// Role can be assumed.
type Role struct {
	ARN string
	// Trusted are the principals that may, all where it is empty.
	Trusted []string
	// ExternalID must be sent, where it is set.
	ExternalID string
}

// Call is a request whose signature was good.
type Call struct {
	// Service as it is signed: ecr, ecr-public or sts.
	Service string
	Action  string
	// Region that it was signed for.
	Region string
	// Principal that signed, or for AssumeRoleWithWebIdentity the role.
	Principal string
}

// Fault is an answer other than the usual one. The first that is set counts.
type Fault struct {
	// Hang: no answer at all.
	Hang bool
	// Body is sent as it is, with Status and ContentType.
	Body        string
	ContentType string
	// Location makes it a redirect.
	Location string
	// Truncate sends half of the usual answer and closes the connection.
	Truncate bool
	// Code and Message make an error in the service's own form.
	Code, Message string
	// Status is 400 where it is zero.
	Status int
}

// Grant is a token that was given out.
type Grant struct {
	Password  string
	Principal string
	Region    string
	Public    bool
	// Expires is when the registry refuses it.
	Expires time.Time
}

// Server is one AWS. Its fields may be set before it serves, the others through its methods.
type Server struct {
	// Clock is AWS's time; nil: the machine's.
	Clock func() time.Time
	// Life of tokens; zero: 12 hours.
	Life time.Duration

	mu      sync.Mutex
	keys    map[string]Key
	roles   map[string]Role
	denied  map[string]bool
	grants  map[string]Grant
	calls   []Call
	refused []string
	fault   func(Call) *Fault
	answer  func(Call, *Answer)
}

// Answer is what GetAuthorizationToken says; a test may have it lie.
type Answer struct {
	// Token is the encoded one.
	Token   string
	Expires time.Time
	// Empty: no authorization data at all.
	Empty bool
}

// New returns an AWS that knows nobody.
func New() *Server {
	return &Server{keys: map[string]Key{}, roles: map[string]Role{}, denied: map[string]bool{}, grants: map[string]Grant{}}
}

func (s *Server) now() time.Time {
	if s.Clock == nil {
		return time.Now()
	}
	return s.Clock()
}

// AddKey lets a key in, instead of any other of that ID.
func (s *Server) AddKey(key Key) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.keys[key.AccessKeyID] = key
}

// RemoveKey does not know a key any more.
func (s *Server) RemoveKey(accessKeyID string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.keys, accessKeyID)
}

// AddRole lets a role be assumed.
func (s *Server) AddRole(role Role) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.roles[role.ARN] = role
}

// Deny has no token given to a principal, or given again.
func (s *Server) Deny(principal string, denied bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.denied[principal] = denied
}

// Faults has every call answered by the fault that this returns, if any. Nil ends it.
func (s *Server) Faults(fault func(Call) *Fault) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fault = fault
}

// Answers has GetAuthorizationToken answer as changed by this. Nil ends it.
func (s *Server) Answers(change func(Call, *Answer)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.answer = change
}

// Calls are those with a good signature, since the last time.
func (s *Server) Calls() []Call {
	s.mu.Lock()
	defer s.mu.Unlock()
	calls := s.calls
	s.calls = nil
	return calls
}

// Refused says why requests were refused before they were calls, since the last time.
func (s *Server) Refused() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	refused := s.refused
	s.refused = nil
	return refused
}

// Grants are the tokens that were given out.
func (s *Server) Grants() []Grant {
	s.mu.Lock()
	defer s.mu.Unlock()
	var grants []Grant
	for _, g := range s.grants {
		grants = append(grants, g)
	}
	slices.SortFunc(grants, func(a, b Grant) int { return a.Expires.Compare(b.Expires) })
	return grants
}

// Revoke has a token refused from now on.
func (s *Server) Revoke(password string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.grants, password)
}

// Opens reports whether a registry in a region lets this user in.
func (s *Server) Opens(region string, public bool, username, password string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	g, ok := s.grants[password]
	return ok && username == "AWS" && g.Region == region && g.Public == public && s.now().Before(g.Expires)
}

// Guard lets requests through to a registry in a region that have a good token, and refuses all others as ECR does.
func (s *Server) Guard(region string, registry http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		username, password, _ := r.BasicAuth()
		if !s.Opens(region, false, username, password) {
			w.Header().Set("Www-Authenticate", `Basic realm="ecr",service="ecr.amazonaws.com"`)
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(http.StatusUnauthorized)
			_, _ = io.WriteString(w, `{"errors":[{"code":"DENIED","message":"Your authorization token has expired. Reauthenticate and try again."}]}`)
			return
		}
		registry.ServeHTTP(w, r)
	})
}

// refusal is an error of AWS.
type refusal struct {
	status        int
	code, message string
}

func (e refusal) Error() string { return e.code + ": " + e.message }

// ServeHTTP answers as AWS does, at one host for all services and regions.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Date", s.now().UTC().Format(http.TimeFormat))
	w.Header().Set("X-Amzn-Requestid", rand.Text())
	body, err := io.ReadAll(io.LimitReader(r.Body, 1<<20))
	if err != nil {
		return
	}
	form := url.Values{}
	if strings.HasPrefix(r.Header.Get("Content-Type"), "application/x-www-form-urlencoded") {
		form, _ = url.ParseQuery(string(body))
	}
	call, err := s.identify(r, body, form)
	if err != nil {
		s.mu.Lock()
		s.refused = append(s.refused, err.Error())
		s.mu.Unlock()
		refuse(w, call.Service, err)
		return
	}
	s.mu.Lock()
	s.calls = append(s.calls, call)
	fault := s.fault
	s.mu.Unlock()
	var f *Fault
	if fault != nil {
		f = fault(call)
	}
	s.serve(w, r, call, form, f)
}

func (s *Server) serve(w http.ResponseWriter, r *http.Request, call Call, form url.Values, f *Fault) {
	switch {
	case f == nil, f.Truncate:
	case f.Hang:
		<-r.Context().Done()
		return
	case f.Body != "":
		w.Header().Set("Content-Type", f.ContentType)
		w.WriteHeader(max(f.Status, http.StatusOK))
		_, _ = io.WriteString(w, f.Body)
		return
	case f.Location != "":
		http.Redirect(w, r, f.Location, http.StatusTemporaryRedirect)
		return
	default:
		refuse(w, call.Service, refusal{f.Status, f.Code, f.Message})
		return
	}
	answer, contentType, err := s.act(call, form)
	if err != nil {
		refuse(w, call.Service, err)
		return
	}
	w.Header().Set("Content-Type", contentType)
	w.Header().Set("Content-Length", fmt.Sprint(len(answer)))
	if f != nil && f.Truncate {
		_, _ = w.Write(answer[:len(answer)/2])
		_ = http.NewResponseController(w).Flush()
		panic(http.ErrAbortHandler)
	}
	_, _ = w.Write(answer)
}

var credentialScope = regexp.MustCompile(`^AWS4-HMAC-SHA256 Credential=([^/]+)/[0-9]{8}/([a-z0-9-]+)/([a-z-]+)/aws4_request, SignedHeaders=([a-z0-9;-]+), Signature=([0-9a-f]{64})$`)

// identify says which call a request is, and who makes it.
func (s *Server) identify(r *http.Request, body []byte, form url.Values) (Call, error) {
	if form.Get("Action") == "AssumeRoleWithWebIdentity" { // the one that is not signed
		return Call{Service: "sts", Action: form.Get("Action"), Principal: form.Get("RoleArn")}, nil
	}
	parts := credentialScope.FindStringSubmatch(r.Header.Get("Authorization"))
	if parts == nil {
		return Call{Service: "ecr"}, refusal{http.StatusBadRequest, "MissingAuthenticationTokenException", "Missing Authentication Token"}
	}
	id, region, service, signed := parts[1], parts[2], parts[3], strings.Split(parts[4], ";")
	call := Call{Service: service, Region: region}
	s.mu.Lock()
	key, known := s.keys[id]
	s.mu.Unlock()
	unknown := map[string]string{"sts": "InvalidClientTokenId"}[service]
	if unknown == "" {
		unknown = "UnrecognizedClientException"
	}
	if !known || key.SessionToken != r.Header.Get("X-Amz-Security-Token") {
		return call, refusal{http.StatusForbidden, unknown, "The security token included in the request is invalid."}
	}
	if err := s.verify(r, body, key, region, service, signed); err != nil {
		return call, err
	}
	if !key.Expires.IsZero() && !s.now().Before(key.Expires) {
		return call, refusal{http.StatusForbidden, map[bool]string{true: "ExpiredToken", false: "ExpiredTokenException"}[service == "sts"], "The security token included in the request is expired"}
	}
	call.Principal = key.Principal
	switch target := r.Header.Get("X-Amz-Target"); {
	case service == "ecr" && target == "AmazonEC2ContainerRegistry_V20150921.GetAuthorizationToken",
		service == "ecr-public" && target == "SpencerFrontendService.GetAuthorizationToken":
		call.Action = "GetAuthorizationToken"
	case service == "sts":
		call.Action = form.Get("Action")
	default:
		return call, refusal{http.StatusBadRequest, "UnknownOperationException", target}
	}
	return call, nil
}

// verify signs what was signed once more, with the key that the signer should have had.
func (s *Server) verify(r *http.Request, body []byte, key Key, region, service string, signed []string) error {
	mismatch := map[bool]string{true: "SignatureDoesNotMatch", false: "InvalidSignatureException"}[service == "sts"]
	at, err := time.Parse("20060102T150405Z", r.Header.Get("X-Amz-Date"))
	if err != nil {
		return refusal{http.StatusForbidden, mismatch, "no X-Amz-Date"}
	}
	again, err := http.NewRequestWithContext(context.Background(), r.Method, "http://"+r.Host+r.URL.RequestURI(), bytes.NewReader(body)) //nolint:gosec // it is only signed
	if err != nil {
		return refusal{http.StatusBadRequest, "MalformedInput", "the request cannot be read"}
	}
	again.ContentLength = 0
	for _, name := range signed {
		switch name {
		case "host":
		case "content-length":
			again.ContentLength = r.ContentLength
		default:
			again.Header[http.CanonicalHeaderKey(name)] = r.Header.Values(name)
		}
	}
	for _, name := range []string{"host", "x-amz-date"} {
		if !slices.Contains(signed, name) {
			return refusal{http.StatusForbidden, mismatch, name + " is not signed"}
		}
	}
	hash := sha256.Sum256(body)
	credentials := aws.Credentials{AccessKeyID: key.AccessKeyID, SecretAccessKey: key.SecretAccessKey, SessionToken: key.SessionToken}
	if err := v4.NewSigner().SignHTTP(context.Background(), credentials, again, hex.EncodeToString(hash[:]), service, region, at); err != nil {
		return refusal{http.StatusBadRequest, "MalformedInput", "the request cannot be signed"}
	}
	if subtle.ConstantTimeCompare([]byte(again.Header.Get("Authorization")), []byte(r.Header.Get("Authorization"))) != 1 {
		// AWS quotes what it would have signed, with every header.
		return refusal{http.StatusForbidden, mismatch, "The request signature we calculated does not match the signature you provided. The Canonical String for this request should have been '" + fmt.Sprint(r.Header) + "'"}
	}
	if s.now().Sub(at).Abs() > 5*time.Minute {
		return refusal{http.StatusForbidden, mismatch, "Signature expired: " + at.Format(time.RFC3339) + " is now earlier than the time allowed"}
	}
	return nil
}

// act does what a call asks for.
func (s *Server) act(call Call, form url.Values) (answer []byte, contentType string, err error) {
	switch call.Action {
	case "GetAuthorizationToken":
		answer, err = s.token(call)
		return answer, "application/x-amz-json-1.1", err
	case "GetCallerIdentity":
		answer, err = xml.Marshal(identityResponse{Arn: call.Principal, Account: strings.Split(call.Principal+"::::", ":")[4]})
		return answer, "text/xml", err
	case "AssumeRole", "AssumeRoleWithWebIdentity":
		answer, err = s.assume(call, form)
		return answer, "text/xml", err
	default:
		return nil, "", refusal{http.StatusBadRequest, "InvalidAction", "Could not find operation"}
	}
}

// password is as long as those of AWS: from 1,772 characters for a user to 2,700 for some roles.
func password() string {
	raw := make([]byte, 1329)
	_, _ = rand.Read(raw) // it never fails
	return base64.StdEncoding.EncodeToString(raw)
}

func (s *Server) token(call Call) ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.denied[call.Principal] {
		return nil, refusal{http.StatusBadRequest, "AccessDeniedException", "User: " + call.Principal + " is not authorized to perform: " + call.Service + ":GetAuthorizationToken on resource: * because no identity-based policy allows the action"}
	}
	life := s.Life
	if life == 0 {
		life = 12 * time.Hour
	}
	g := Grant{Password: password(), Principal: call.Principal, Region: call.Region, Public: call.Service == "ecr-public", Expires: s.now().Add(life)}
	s.grants[g.Password] = g
	answer := Answer{Token: base64.StdEncoding.EncodeToString([]byte("AWS:" + g.Password)), Expires: g.Expires}
	if s.answer != nil {
		s.answer(call, &answer)
	}
	type data struct {
		Token     string  `json:"authorizationToken"`
		ExpiresAt float64 `json:"expiresAt"`
		Endpoint  string  `json:"proxyEndpoint,omitempty"`
	}
	d := data{Token: answer.Token, ExpiresAt: float64(answer.Expires.UnixMilli()) / 1000}
	switch {
	case answer.Empty:
		return []byte(`{}`), nil
	case g.Public:
		return json.Marshal(map[string]data{"authorizationData": d})
	default:
		d.Endpoint = "https://123456789012.dkr.ecr." + call.Region + ".amazonaws.com"
		return json.Marshal(map[string][]data{"authorizationData": {d}})
	}
}

func (s *Server) assume(call Call, form url.Values) ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	role, ok := s.roles[form.Get("RoleArn")]
	web := call.Action == "AssumeRoleWithWebIdentity"
	allowed := ok && (web || len(role.Trusted) == 0 || slices.Contains(role.Trusted, call.Principal)) && role.ExternalID == form.Get("ExternalId")
	if !allowed || web && form.Get("WebIdentityToken") == "" {
		return nil, refusal{http.StatusForbidden, "AccessDenied", "User: " + call.Principal + " is not authorized to perform: sts:" + call.Action + " on resource: " + form.Get("RoleArn")}
	}
	account, name := strings.Split(role.ARN, ":")[4], role.ARN[strings.LastIndex(role.ARN, "/")+1:]
	partition := strings.Split(role.ARN, ":")[1]
	key := Key{
		AccessKeyID: "ASIA" + rand.Text()[:16], SecretAccessKey: rand.Text(), SessionToken: rand.Text(),
		Principal: "arn:" + partition + ":sts::" + account + ":assumed-role/" + name + "/" + form.Get("RoleSessionName"),
		Expires:   s.now().Add(time.Hour),
	}
	s.keys[key.AccessKeyID] = key
	result := assumed{
		Arn: key.Principal, AccessKeyID: key.AccessKeyID, SecretAccessKey: key.SecretAccessKey,
		SessionToken: key.SessionToken, Expiration: key.Expires.UTC().Format(time.RFC3339),
	}
	if web {
		return xml.Marshal(webResponse{Result: result})
	}
	return xml.Marshal(roleResponse{Result: result})
}

// The answers of STS (https://docs.aws.amazon.com/STS/latest/APIReference/API_AssumeRole.html).
type (
	identityResponse struct {
		XMLName struct{} `xml:"https://sts.amazonaws.com/doc/2011-06-15/ GetCallerIdentityResponse"`
		Arn     string   `xml:"GetCallerIdentityResult>Arn"`
		Account string   `xml:"GetCallerIdentityResult>Account"`
	}
	roleResponse struct {
		XMLName struct{} `xml:"https://sts.amazonaws.com/doc/2011-06-15/ AssumeRoleResponse"`
		Result  assumed  `xml:"AssumeRoleResult"`
	}
	webResponse struct {
		XMLName struct{} `xml:"https://sts.amazonaws.com/doc/2011-06-15/ AssumeRoleWithWebIdentityResponse"`
		Result  assumed  `xml:"AssumeRoleWithWebIdentityResult"`
	}
	assumed struct {
		Arn             string `xml:"AssumedRoleUser>Arn"`
		AccessKeyID     string `xml:"Credentials>AccessKeyId"`
		SecretAccessKey string `xml:"Credentials>SecretAccessKey"`
		SessionToken    string `xml:"Credentials>SessionToken"`
		Expiration      string `xml:"Credentials>Expiration"`
	}
	errorResponse struct {
		XMLName struct{} `xml:"https://sts.amazonaws.com/doc/2011-06-15/ ErrorResponse"`
		Type    string   `xml:"Error>Type"`
		Code    string   `xml:"Error>Code"`
		Message string   `xml:"Error>Message"`
	}
)

// refuse answers with an error in the form of the service.
func refuse(w http.ResponseWriter, service string, err error) {
	r := refusal{http.StatusInternalServerError, "ServerException", "internal"}
	errors.As(err, &r)
	if r.status == 0 {
		r.status = http.StatusBadRequest
	}
	var body []byte
	if service == "sts" {
		w.Header().Set("Content-Type", "text/xml")
		body, _ = xml.Marshal(errorResponse{Type: "Sender", Code: r.code, Message: r.message})
	} else {
		w.Header().Set("Content-Type", "application/x-amz-json-1.1")
		body, _ = json.Marshal(map[string]string{"__type": r.code, "message": r.message})
	}
	w.WriteHeader(r.status)
	_, _ = w.Write(body)
}
