package cluster

import (
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
)

// tokenSeconds is asked for as the life of every token: longer than any test
// or demonstration.
const tokenSeconds = int64(24 * 60 * 60)

// Admin returns a config of the user "admin" in group system:masters, who may
// do everything, without a client-side rate limit. The caller owns it.
func (c *Cluster) Admin() *rest.Config {
	return rest.CopyConfig(c.admin)
}

// Client returns a client of the user of Admin.
func (c *Cluster) Client() *kubernetes.Clientset {
	return c.client
}

// Kubeconfig returns the path of a kubeconfig file for the user of Admin. Stop
// removes it.
func (c *Cluster) Kubeconfig() string {
	return c.dir.path(adminKubeconfig)
}

// ConfigForToken returns a config that authenticates with a bearer token,
// without a client-side rate limit.
func (c *Cluster) ConfigForToken(token string) *rest.Config {
	cfg := c.anonymous()
	cfg.BearerToken = token
	return cfg
}

// ConfigForUser returns a config that authenticates as any user in any groups,
// with a client certificate made on the spot: for instance a kubelet, user
// system:node:NAME in group system:nodes.
func (c *Cluster) ConfigForUser(user string, groups ...string) (*rest.Config, error) {
	p, err := c.authority.user(user, groups)
	if err != nil {
		return nil, err
	}
	cfg := c.anonymous()
	cfg.CertData, cfg.KeyData = p.cert, p.key
	return cfg, nil
}

func (c *Cluster) anonymous() *rest.Config {
	return &rest.Config{
		Host:            c.url,
		TLSClientConfig: rest.TLSClientConfig{CAData: c.authority.pem},
		QPS:             -1,
	}
}

// Token returns a token of a ServiceAccount that is bound to no object and
// valid for a day. It waits up to ten seconds for the ServiceAccount to appear.
func (c *Cluster) Token(ctx context.Context, namespace, serviceAccount string) (string, error) {
	return c.requestToken(ctx, namespace, serviceAccount, nil)
}

// ExpiringToken is a Token that ends after a time, which may be shorter than
// the ten minutes that the API server gives away at least. The server goes on
// accepting a token that it knows for up to ten seconds. It forgives
// clocks a minute, which the token's end allows for.
func (c *Cluster) ExpiringToken(ctx context.Context, namespace, serviceAccount string, life time.Duration) (string, error) {
	account, err := c.client.CoreV1().ServiceAccounts(namespace).Get(ctx, serviceAccount, metav1.GetOptions{})
	if err != nil {
		return "", fmt.Errorf("read the ServiceAccount of a token: %w", err)
	}
	// https://pkg.go.dev/github.com/go-jose/go-jose/v4/jwt#DefaultLeeway
	const leeway = time.Minute
	now := time.Now().Add(-leeway)
	var parts [2]string
	for i, part := range []map[string]any{
		{"alg": "ES256", "typ": "JWT"},
		{
			"iss": accountIssuer, "aud": []string{accountIssuer}, "sub": "system:serviceaccount:" + namespace + ":" + serviceAccount,
			"iat": now.Unix(), "nbf": now.Unix(), "exp": now.Add(life).Unix(),
			"kubernetes.io": map[string]any{
				"namespace":      namespace,
				"serviceaccount": map[string]any{"name": serviceAccount, "uid": account.UID},
			},
		},
	} {
		raw, err := json.Marshal(part)
		if err != nil {
			return "", fmt.Errorf("encode a token: %w", err)
		}
		parts[i] = base64.RawURLEncoding.EncodeToString(raw)
	}
	signed := parts[0] + "." + parts[1]
	digest := sha256.Sum256([]byte(signed))
	r, s, err := ecdsa.Sign(rand.Reader, c.accounts.private, digest[:])
	if err != nil {
		return "", fmt.Errorf("sign a token: %w", err)
	}
	signature := make([]byte, 64)
	r.FillBytes(signature[:32])
	s.FillBytes(signature[32:])
	return signed + "." + base64.RawURLEncoding.EncodeToString(signature), nil
}

// NodeToken returns a token of a ServiceAccount as a Pod of the node would get
// it: it creates a Pod on the node and binds the token to it, so that it
// carries the claims of Pod and node. The node must exist (see Node). Each call
// makes a Pod; the token ends with it, or after a day. It waits up to ten
// seconds for the ServiceAccount to appear.
func (c *Cluster) NodeToken(ctx context.Context, namespace, serviceAccount, node string) (string, error) {
	automount, grace := false, int64(0)
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{GenerateName: serviceAccount + "-", Namespace: namespace},
		Spec: corev1.PodSpec{
			NodeName:                     node,
			ServiceAccountName:           serviceAccount,
			AutomountServiceAccountToken: &automount,
			// There is no kubelet to end it: with a grace period the Pod, and
			// its namespace, would hang in deletion for ever.
			TerminationGracePeriodSeconds: &grace,
			Containers:                    []corev1.Container{{Name: "main", Image: "registry.invalid/main"}},
		},
	}
	err := c.retryWithoutAccount(ctx, namespace, serviceAccount, func(ctx context.Context) error {
		created, err := c.client.CoreV1().Pods(namespace).Create(ctx, pod, metav1.CreateOptions{})
		if err == nil {
			pod = created
		}
		return err
	})
	if err != nil {
		return "", fmt.Errorf("create a pod for a token of %s/%s: %w", namespace, serviceAccount, err)
	}
	return c.requestToken(ctx, namespace, serviceAccount, &authenticationv1.BoundObjectReference{
		APIVersion: "v1", Kind: "Pod", Name: pod.Name, UID: pod.UID,
	})
}

// retryWithoutAccount waits for the ServiceAccount first: a Pod without one is
// refused with "forbidden", which must not be retried blindly.
func (c *Cluster) retryWithoutAccount(ctx context.Context, namespace, name string, try func(context.Context) error) error {
	err := retryNotFound(ctx, func(ctx context.Context) error {
		_, err := c.client.CoreV1().ServiceAccounts(namespace).Get(ctx, name, metav1.GetOptions{})
		return err
	})
	if err != nil {
		return err
	}
	return try(ctx)
}

func (c *Cluster) requestToken(ctx context.Context, namespace, name string, bound *authenticationv1.BoundObjectReference) (string, error) {
	seconds := tokenSeconds
	request := &authenticationv1.TokenRequest{
		Spec: authenticationv1.TokenRequestSpec{ExpirationSeconds: &seconds, BoundObjectRef: bound},
	}
	var token string
	err := retryNotFound(ctx, func(ctx context.Context) error {
		answer, err := c.client.CoreV1().ServiceAccounts(namespace).CreateToken(ctx, name, request, metav1.CreateOptions{})
		if err == nil {
			token = answer.Status.Token
		}
		return err
	})
	if err != nil {
		return "", fmt.Errorf("request a token of %s/%s: %w", namespace, name, err)
	}
	return token, nil
}

// Node creates a Node object that is Ready, as a kubelet would register it. It
// does nothing when the node exists.
func (c *Cluster) Node(ctx context.Context, name string) error {
	now := metav1.Now()
	capacity := corev1.ResourceList{
		corev1.ResourceCPU:    resource.MustParse("4"),
		corev1.ResourceMemory: resource.MustParse("8Gi"),
		corev1.ResourcePods:   resource.MustParse("110"),
	}
	node := &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{
			corev1.LabelHostname:   name,
			corev1.LabelOSStable:   "linux",
			corev1.LabelArchStable: "amd64",
		}},
		Status: corev1.NodeStatus{
			Capacity:    capacity,
			Allocatable: capacity,
			Conditions: []corev1.NodeCondition{{
				Type: corev1.NodeReady, Status: corev1.ConditionTrue, Reason: "KubeletReady",
				LastHeartbeatTime: now, LastTransitionTime: now,
			}},
			NodeInfo: corev1.NodeSystemInfo{OperatingSystem: "linux", Architecture: "amd64", KubeletVersion: "v1.36.3"},
		},
	}
	_, err := c.client.CoreV1().Nodes().Create(ctx, node, metav1.CreateOptions{})
	if err != nil && !apierrors.IsAlreadyExists(err) {
		return fmt.Errorf("create node %q: %w", name, err)
	}
	return nil
}

// WriteKubeconfig writes a kubeconfig file, readable by its owner only, that
// holds everything a process needs to connect as cfg does. It supports tokens
// and certificates given as data; the rate limit is not part of a kubeconfig.
func (c *Cluster) WriteKubeconfig(path string, cfg *rest.Config) error {
	const name = "imps"
	file := clientcmdapi.NewConfig()
	file.Clusters[name] = &clientcmdapi.Cluster{Server: cfg.Host, CertificateAuthorityData: cfg.CAData}
	file.AuthInfos[name] = &clientcmdapi.AuthInfo{
		Token: cfg.BearerToken, ClientCertificateData: cfg.CertData, ClientKeyData: cfg.KeyData,
	}
	file.Contexts[name] = &clientcmdapi.Context{Cluster: name, AuthInfo: name}
	file.CurrentContext = name
	if err := clientcmd.WriteToFile(*file, path); err != nil {
		return fmt.Errorf("write kubeconfig %s: %w", path, err)
	}
	return nil
}
