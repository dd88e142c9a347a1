package ecr

import (
	"encoding/base64"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/imps-node/imps/pkg/api/v1alpha1"
	"github.com/imps-node/imps/test/fakeaws"
	"github.com/imps-node/imps/test/imps"
)

// K9, K10 and K14: each form of identity, beside a docker config, in one Secret, and how long it is good.
func TestEachFormOfIdentityOpensARegistry(t *testing.T) {
	s := newSystem(t)
	s.aws.Life = 90 * time.Second
	s.aws.AddKey(fakeaws.Key{AccessKeyID: "ASIASESSION", SecretAccessKey: "s", SessionToken: canary + "-session", Principal: customerUser + "-session"})
	s.coordinator("coordinator", "coordinator")
	s.source("hub", corev1.SecretTypeDockerConfigJson, map[string]string{corev1.DockerConfigJsonKey: `{"auths":{"registry.one":{"username":"u","password":"` + canary + `"}}}`})
	s.keys("keys")
	s.keys("spaces", "accountID= 123456789012\n", "region=eu-central-1\n")
	s.keys("session", "accessKeyID=ASIASESSION", "secretKey=s", "sessionToken="+canary+"-session")
	s.keys("role", "roleArn="+otherRole)
	s.keys("external", "roleArn="+pullRole, "externalID="+externalID)
	s.keys("empty", "accessKeyID=", "secretKey=")
	s.keys("empty-role", "accessKeyID=", "secretKey=", "roleArn="+otherRole)
	s.keys("govcloud", "region=us-gov-west-1")
	secret := func(name string) string { return `{name: ` + name + `, namespace: ` + imps.SourceNamespace + `}` }
	for name, test := range map[string]struct {
		source, host, region, principal string
		public                          bool
	}{
		"keys":           {secret("keys"), frankfurt, "eu-central-1", customerUser, false},
		"spaces":         {secret("spaces"), frankfurt, "eu-central-1", customerUser, false},
		"session":        {secret("session"), frankfurt, "eu-central-1", customerUser + "-session", false},
		"role":           {secret("role"), frankfurt, "eu-central-1", "arn:aws:sts::444444444444:assumed-role/pull/imps-", false},
		"external":       {secret("external"), frankfurt, "eu-central-1", "arn:aws:sts::333333333333:assumed-role/pull/imps-", false},
		"empty":          {secret("empty"), frankfurt, "eu-central-1", coordinatorUser, false},
		"empty-role":     {secret("empty-role"), frankfurt, "eu-central-1", "arn:aws:sts::444444444444:assumed-role/pull/imps-", false},
		"govcloud":       {secret("govcloud"), "123456789012.dkr.ecr.us-gov-west-1.amazonaws.com", "us-gov-west-1", customerUser, false},
		"inline":         {`{ecr: {registries: [` + frankfurt + `]}}`, frankfurt, "eu-central-1", coordinatorUser, false},
		"inline-role":    {`{ecr: {registries: [` + frankfurt + `], roleARN: "` + otherRole + `"}}`, frankfurt, "eu-central-1", "arn:aws:sts::444444444444:assumed-role/pull/imps-", false},
		"inline-id":      {`{ecr: {registries: [` + frankfurt + `], roleARN: "` + pullRole + `", externalID: "` + externalID + `"}}`, frankfurt, "eu-central-1", "arn:aws:sts::333333333333:assumed-role/pull/imps-", false},
		"inline-china":   {`{ecr: {registries: [123456789012.dkr.ecr.cn-north-1.amazonaws.com.cn]}}`, "123456789012.dkr.ecr.cn-north-1.amazonaws.com.cn", "cn-north-1", coordinatorUser, false},
		"inline-public":  {`{ecr: {registries: [public.ecr.aws]}}`, "public.ecr.aws", "us-east-1", coordinatorUser, true},
		"inline-ipv6":    {`{ecr: {registries: [123456789012.dkr-ecr.eu-central-1.on.aws]}}`, "123456789012.dkr-ecr.eu-central-1.on.aws", "eu-central-1", coordinatorUser, false},
		"inline-eusc":    {`{ecr: {registries: [123456789012.dkr.ecr.eusc-de-east-1.amazonaws.eu]}}`, "123456789012.dkr.ecr.eusc-de-east-1.amazonaws.eu", "eusc-de-east-1", coordinatorUser, false},
		"inline-us-fips": {`{ecr: {registries: [123456789012.dkr.ecr-fips.us-east-1.amazonaws.com]}}`, "123456789012.dkr.ecr-fips.us-east-1.amazonaws.com", "us-east-1", coordinatorUser, false},
	} {
		namespace := s.namespace()
		s.resource(name, namespace, `[{name: hub, namespace: `+imps.SourceNamespace+`}, `+test.source+`]`)
		grant := s.opens(namespace, test.host, test.region, test.public)
		require.True(t, strings.HasPrefix(grant.Principal, test.principal), "%s: %s", name, grant.Principal)
		auths, _, err := s.auths(namespace)
		require.NoError(t, err)
		require.Len(t, auths, 2, name)
		for host, a := range auths {
			require.Equal(t, base64.StdEncoding.EncodeToString([]byte(a.Username+":"+a.Password)), a.Auth, "%s: %s", name, host)
		}
		status := s.status(name, ready)
		require.Len(t, status.SourceSecretStatus, 2)
		for _, source := range status.SourceSecretStatus {
			require.Equal(t, v1alpha1.SourceOK, source)
		}
		require.Positive(t, status.ValiditySeconds, "seconds until the token expires")
		require.LessOrEqual(t, status.ValiditySeconds, int64(90))
	}
	require.Empty(t, s.aws.Refused())
}

// B1: two roles behind one key pair.
func TestTwoRolesBehindOneKeyPairHaveTwoTokens(t *testing.T) {
	s := newSystem(t)
	s.coordinator("coordinator", "coordinator")
	s.aws.AddRole(fakeaws.Role{ARN: pullRole})
	accounts := map[string]string{}
	for name, role := range map[string]string{"one": pullRole, "two": otherRole} {
		s.keys(name, "roleArn="+role)
		namespace := s.namespace()
		s.resource(name, namespace, `[{name: `+name+`, namespace: `+imps.SourceNamespace+`}]`)
		accounts[name] = strings.Split(s.opens(namespace, frankfurt, "eu-central-1", false).Principal, ":")[4]
	}
	require.Equal(t, map[string]string{"one": "333333333333", "two": "444444444444"}, accounts)
}

// Many accounts and registries and several resources behind one identity cost one call; neither agents nor new leaders cost
// any.
func TestOneIdentityCostsOneCall(t *testing.T) {
	s := newSystem(t)
	first := s.coordinator("first", "coordinator")
	s.leads(first)
	s.agents(50)
	var hosts []string
	for i := range 200 {
		hosts = append(hosts, fmt.Sprintf("%012d.dkr.ecr.eu-central-1.amazonaws.com", 100000000000+i))
	}
	namespaces := []string{s.namespace(), s.namespace()}
	for i, namespace := range namespaces {
		s.resource(fmt.Sprint("r", i), namespace, `[{ecr: {registries: [`+strings.Join(hosts, ",")+`]}}]`)
		s.opens(namespace, hosts[i], "eu-central-1", false)
		auths, _, err := s.auths(namespace)
		require.NoError(t, err)
		require.Len(t, auths, 200)
		s.status(fmt.Sprint("r", i), ready)
	}
	require.Equal(t, 1, s.mints())
	leaders := []*imps.Process{first}
	for i := range 3 {
		next := s.coordinator(fmt.Sprint("next-", i), "coordinator")
		require.NoError(t, leaders[len(leaders)-1].Terminate())
		s.leads(next)
		leaders = append(leaders, next)
		for j := range namespaces {
			s.status(fmt.Sprint("r", j), ready)
		}
		s.pass(2 * time.Second) // what should not be asked for would have been by then
	}
	require.Zero(t, s.mints())
	require.Len(t, s.aws.Grants(), 1)
}

// A rotation rewrites each Secret once, in place, and no pull is refused.
func TestPullsDuringRotations(t *testing.T) {
	s := newSystem(t)
	s.aws.Life = 90 * time.Second
	s.coordinator("coordinator", "coordinator")
	h := s.hub(frankfurt, "eu-central-1")
	namespaces := []string{s.namespace(), s.namespace(), s.namespace()}
	spec := `[{ecr: {registries: [` + frankfurt + `]}}]`
	for i, namespace := range namespaces {
		s.resource(fmt.Sprint("r", i), namespace, spec)
		s.opens(namespace, frankfurt, "eu-central-1", false)
	}
	require.ErrorContains(t, s.pull("default", h), "not found")
	changes := s.watch()
	s.mints()
	var pulls, refused atomic.Int64
	var failures sync.Map
	stop := make(chan struct{})
	var pulling sync.WaitGroup
	for _, namespace := range namespaces {
		pulling.Go(func() {
			tick := time.NewTicker(600 * time.Millisecond)
			defer tick.Stop()
			for {
				select {
				case <-stop:
					return
				case <-tick.C:
				}
				pulls.Add(1)
				if err := s.pull(namespace, h); err != nil {
					refused.Add(1)
					failures.Store(err.Error(), true)
				}
			}
		})
	}
	mints := 0
	for deadline := time.Now().Add(4 * time.Minute); mints < 3 && time.Now().Before(deadline); mints += s.mints() {
		s.pass(time.Second)
	}
	for pulls.Load() < 600 {
		s.pass(time.Second)
		mints += s.mints()
	}
	s.pass(3 * time.Second) // the last one arrives, and a write too many would
	mints += s.mints()
	close(stop)
	pulling.Wait()
	require.GreaterOrEqual(t, mints, 3)
	failures.Range(func(failure, _ any) bool { t.Log(failure); return true })
	require.Zero(t, refused.Load(), "of %d", pulls.Load())
	for _, namespace := range namespaces {
		writes, secrets := changes.writes(namespace)
		require.Equal(t, mints, writes, "once for each rotation")
		require.Equal(t, 1, secrets, "in place")
		require.NoError(t, s.pull(namespace, h))
	}
	for _, g := range s.aws.Grants() {
		s.aws.Revoke(g.Password)
	}
	require.ErrorContains(t, s.pull(namespaces[0], h), "DENIED", "the registry does look")
}

// AWS fails: what is good stays until its end, the status and an Event tell before it, and then only what has expired goes.
func TestAnOutageOfAWSIsToldBeforeAnythingBreaks(t *testing.T) {
	s := newSystem(t)
	s.aws.Life = 40 * time.Second
	s.coordinator("coordinator", "coordinator")
	s.source("hub", corev1.SecretTypeDockerConfigJson, map[string]string{corev1.DockerConfigJsonKey: `{"auths":{"registry.one":{"username":"u","password":"` + canary + `"}}}`})
	namespace := s.namespace()
	s.resource("r", namespace, `[{ecr: {registries: [`+frankfurt+`]}}, {name: hub, namespace: `+imps.SourceNamespace+`}]`)
	s.opens(namespace, frankfurt, "eu-central-1", false)
	status := s.status("r", ready)
	require.Positive(t, status.ValiditySeconds)
	require.LessOrEqual(t, status.ValiditySeconds, int64(40))
	s.aws.Faults(func(fakeaws.Call) *fakeaws.Fault { return &fakeaws.Fault{Code: "ThrottlingException"} })

	status = s.status("r", failed("AWS throttles (ThrottlingException); its last good credentials stay in use until "))
	require.Contains(t, status.SourceSecretStatus["ecr."+frankfurt], "token for eu-central-1 as ambient: GetAuthorizationToken: AWS throttles")
	s.opens(namespace, frankfurt, "eu-central-1", false)
	s.eventually(func() error {
		events, err := s.core.CoreV1().Events("default").List(t.Context(), metav1.ListOptions{FieldSelector: "involvedObject.name=" + s.prefix + "r"})
		if err != nil {
			return err
		}
		for _, e := range events.Items {
			if e.Reason == "SourceCredentialsError" && strings.Contains(e.Message, "AWS throttles") {
				return nil
			}
		}
		return fmt.Errorf("none of %d Events", len(events.Items))
	}, "no Event tells")
	s.opens(namespace, frankfurt, "eu-central-1", false) // still

	s.eventually(func() error {
		auths, _, err := s.auths(namespace)
		if err != nil {
			return err
		}
		if _, ok := auths[frankfurt]; ok {
			return errors.New("the token is there")
		}
		if auths["registry.one"].Password != canary {
			return errors.New("the other registry is gone")
		}
		return nil
	}, "what has expired does not go")
	s.status("r", failed("AWS throttles (ThrottlingException)"))
	s.aws.Faults(nil)
	s.opens(namespace, frankfurt, "eu-central-1", false)
	s.status("r", ready)
}

// A mistake in the spec leaves in force what was delivered before, and the token in it does not expire for that.
func TestATokenIsRenewedWhereTheSpecHasAProblem(t *testing.T) {
	s := newSystem(t)
	s.aws.Life = 40 * time.Second
	s.coordinator("coordinator", "coordinator")
	namespace := s.namespace()
	s.resource("r", namespace, `[{ecr: {registries: [`+frankfurt+`]}}]`)
	before := s.opens(namespace, frankfurt, "eu-central-1", false)
	_, was, err := s.auths(namespace)
	require.NoError(t, err)
	s.retarget("r", "not-allowed")
	s.status("r", failed("not-allowed"))
	s.eventually(func() error {
		if s.opens(namespace, frankfurt, "eu-central-1", false) == before {
			return errors.New("it is still the same")
		}
		return nil
	}, "the token is not renewed")
	_, is, err := s.auths(namespace)
	require.NoError(t, err)
	require.Equal(t, was.UID, is.UID)
	s.status("r", failed("not-allowed"))
	s.retarget("r", imps.SecretName)
	s.status("r", ready)
}

// Other keys that get nothing leave the token that there was, also with the next leader.
func TestOtherKeysThatGetNothing(t *testing.T) {
	s := newSystem(t)
	first := s.coordinator("first", "coordinator")
	s.keys("keys")
	namespace := s.namespace()
	s.resource("r", namespace, `[{name: keys, namespace: `+imps.SourceNamespace+`}]`)
	before := s.opens(namespace, frankfurt, "eu-central-1", false)
	kept := func(status v1alpha1.ImagePullSecretStatus) error {
		source := status.SourceSecretStatus[imps.SourceNamespace+".keys"]
		if !strings.Contains(source, "AssumeRole: AWS does not allow it (AccessDenied)") || !strings.Contains(source, "; its last good credentials stay in use until ") {
			return errors.New("it does not say so")
		}
		return nil
	}
	s.keys("keys", "roleArn=arn:aws:iam::999999999999:role/none")
	s.status("r", kept)
	require.Equal(t, before, s.opens(namespace, frankfurt, "eu-central-1", false))
	second := s.coordinator("second", "coordinator")
	require.NoError(t, first.Terminate())
	s.leads(second)
	s.status("r", kept)
	require.Equal(t, before, s.opens(namespace, frankfurt, "eu-central-1", false))
	s.keys("keys", "accountID=210987654321")
	s.opens(namespace, "210987654321.dkr.ecr.eu-central-1.amazonaws.com", "eu-central-1", false)
	s.status("r", ready)
	auths, _, err := s.auths(namespace)
	require.NoError(t, err)
	require.NotContains(t, auths, frankfurt, "it is not asked for any more")
}

// A leader that is somebody else at AWS keeps the tokens of the one before.
func TestALeaderWithAnotherIdentityKeepsTheTokens(t *testing.T) {
	s := newSystem(t)
	first := s.coordinator("first", "coordinator")
	s.leads(first)
	namespace := s.namespace()
	s.resource("r", namespace, `[{ecr: {registries: [`+frankfurt+`]}}]`)
	before := s.opens(namespace, frankfurt, "eu-central-1", false)
	s.status("r", ready)
	s.mints()

	second := s.coordinator("second", "customer")
	require.NoError(t, first.Terminate())
	s.leads(second)
	status := s.status("r", func(status v1alpha1.ImagePullSecretStatus) error {
		for _, c := range status.Conditions {
			if c.Type == v1alpha1.ConditionSourcesReady && c.Reason == "IdentityChanged" {
				return nil
			}
		}
		return errors.New("no condition IdentityChanged")
	})
	require.Contains(t, status.Reason, "has changed from "+coordinatorUser+" to "+customerUser)
	require.Equal(t, before, s.opens(namespace, frankfurt, "eu-central-1", false))
	require.Zero(t, s.mints())

	third := s.coordinator("third", "coordinator")
	require.NoError(t, second.Terminate())
	s.leads(third)
	s.status("r", ready)
	require.Equal(t, before, s.opens(namespace, frankfurt, "eu-central-1", false))
	require.Zero(t, s.mints())
}

// A leader without any AWS credentials lets another one lead, and leads where there is no other.
func TestALeaderWithoutCredentialsLetsAnotherLead(t *testing.T) {
	s := newSystem(t)
	poor := s.coordinator("poor", "")
	s.leads(poor)
	rich := s.coordinator("rich", "coordinator")
	namespace := s.namespace()
	s.resource("r", namespace, `[{ecr: {registries: [`+frankfurt+`]}}]`)
	s.leads(rich)
	s.opens(namespace, frankfurt, "eu-central-1", false)
	s.status("r", ready)
	s.mints()

	require.NoError(t, rich.Terminate())
	s.leads(poor)
	s.status("r", failed("there are no AWS credentials for the coordinator itself"))
	s.opens(namespace, frankfurt, "eu-central-1", false)
	require.Zero(t, s.mints())
}

// What is wrong with a source, and what to do, is in the status; the others are served.
func TestWhatIsWrongWithASourceIsTold(t *testing.T) {
	s := newSystem(t)
	s.coordinator("coordinator", "coordinator")
	s.source("hub", corev1.SecretTypeDockerConfigJson, map[string]string{corev1.DockerConfigJsonKey: `{"auths":{"registry.one":{"username":"u","password":"` + canary + `"}}}`})
	s.keys("unknown", "accessKeyID=AKIANOBODY")
	s.keys("wrong", "secretKey="+canary+"-wrong")
	s.keys("half", "secretKey=")
	s.keys("account", "accountID=12345")
	s.keys("role", "roleArn=arn:aws:iam::999999999999:role/none")
	namespace := s.namespace()
	in := func(name string) string { return `{name: ` + name + `, namespace: ` + imps.SourceNamespace + `}` }
	s.resource("r", namespace, `[`+strings.Join([]string{in("hub"), in("unknown"), in("wrong"), in("half"), in("account"), in("role"), `{ecr: {registries: [ghcr.io]}}`}, ", ")+`]`)
	want := map[string]string{
		"unknown": "as access key: GetAuthorizationToken: AWS does not know the credentials (UnrecognizedClientException)",
		"wrong":   "as access key: GetAuthorizationToken: the secret key is wrong (InvalidSignatureException)",
		"half":    "accessKeyID and secretKey belong together",
		"account": "an account ID has 12 digits",
		"role":    "as arn:aws:iam::999999999999:role/none: AssumeRole: AWS does not allow it (AccessDenied)",
	}
	status := s.status("r", failed("6 of 7 sources cannot be used"))
	for name, text := range want {
		require.Contains(t, status.SourceSecretStatus[imps.SourceNamespace+"."+name], text)
	}
	require.Contains(t, status.SourceSecretStatus["ecr.ghcr.io"], "ghcr.io: not an ECR registry")
	auths, _, err := s.auths(namespace)
	require.NoError(t, err)
	require.Len(t, auths, 1)

	// A changed Secret is tried at once.
	s.keys("unknown")
	s.opens(namespace, frankfurt, "eu-central-1", false)
}
